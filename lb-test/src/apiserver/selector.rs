//! Which objects a client asked for.

use serde_json::Value;

use super::store::Kind;

/// Label and field selector of one request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selector {
    terms: Vec<Term>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Term {
    /// JSON pointer of the value.
    pointer: String,
    test: Test,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Test {
    Exists,
    Missing,
    Is(String),
    IsNot(String),
}

impl Selector {
    /// Reads both selectors; fails, as an API server does, at fields it can't select by.
    pub fn parse(kind: Kind, labels: &str, fields: &str) -> Result<Self, String> {
        let mut terms = Vec::new();
        for text in labels.split(',').map(str::trim).filter(|text| !text.is_empty()) {
            terms.push(label_term(text)?);
        }
        for text in fields.split(',').map(str::trim).filter(|text| !text.is_empty()) {
            terms.push(field_term(kind, text)?);
        }
        Ok(Self { terms })
    }

    /// Does it let everything through?
    pub fn is_empty(&self) -> bool {
        self.terms.is_empty()
    }

    /// Does the client want to see it?
    pub fn matches(&self, object: &Value) -> bool {
        self.terms.iter().all(|term| {
            let value = object.pointer(&term.pointer).and_then(Value::as_str);
            match &term.test {
                Test::Exists => value.is_some(),
                Test::Missing => value.is_none(),
                Test::Is(wanted) => value.unwrap_or_default() == wanted,
                Test::IsNot(unwanted) => value.unwrap_or_default() != unwanted,
            }
        })
    }
}

fn label_term(text: &str) -> Result<Term, String> {
    if text.contains(['(', ')', ' ']) {
        return Err(format!("unable to parse requirement: {text:?}: sets are not known here"));
    }
    let (key, test) = match (text.strip_prefix('!'), comparison(text)) {
        (Some(key), _) => (key, Test::Missing),
        (None, Some((key, test))) => (key, test),
        (None, None) => (text, Test::Exists),
    };
    // RFC 6901 §3.
    let key = key.replace('~', "~0").replace('/', "~1");
    Ok(Term { pointer: format!("/metadata/labels/{key}"), test })
}

fn field_term(kind: Kind, text: &str) -> Result<Term, String> {
    let (field, test) = comparison(text).ok_or_else(|| format!("invalid selector: {text:?}"))?;
    let known = match field {
        "metadata.name" => true,
        "metadata.namespace" => kind.is_namespaced(),
        "spec.clusterIP" | "spec.type" => kind == Kind::Service,
        _ => false,
    };
    if !known {
        return Err(format!("field label not supported: {field}"));
    }
    Ok(Term { pointer: format!("/{}", field.replace('.', "/")), test })
}

fn comparison(text: &str) -> Option<(&str, Test)> {
    if let Some((key, value)) = text.split_once("!=") {
        return Some((key, Test::IsNot(value.into())));
    }
    let (key, value) = text.split_once("==").or_else(|| text.split_once('='))?;
    Some((key, Test::Is(value.into())))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn labels_and_fields_select() {
        let object = json!({
            "metadata": {"name": "web", "labels": {"a.io/b": "c"}},
            "spec": {"clusterIP": "10.0.0.1"},
        });
        for (labels, fields, wanted) in [
            ("", "", true),
            ("a.io/b", "", true),
            ("!a.io/b", "", false),
            ("!other", "", true),
            ("a.io/b=c", "", true),
            ("a.io/b==d", "", false),
            ("a.io/b!=c", "", false),
            ("other!=c", "", true),
            ("", "spec.clusterIP!=None", true),
            ("", "spec.clusterIP=None", false),
            ("a.io/b", "metadata.name=web", true),
            ("a.io/b,other", "metadata.name=web", false),
        ] {
            let selector = Selector::parse(Kind::Service, labels, fields).expect("known");
            assert_eq!(selector.matches(&object), wanted, "{labels:?} {fields:?}");
        }
    }

    #[test]
    fn unknown_fields_are_refused() {
        assert!(Selector::parse(Kind::Node, "", "spec.clusterIP=None").is_err());
        assert!(Selector::parse(Kind::Service, "", "metadata.name").is_err());
    }
}
