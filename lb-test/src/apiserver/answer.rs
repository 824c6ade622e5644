//! From a request to an answer.

use std::{collections::BTreeMap, convert::Infallible, sync::Arc};

use axum::{
    body::{Body, HttpBody, to_bytes},
    extract::{Request, State},
    http::{Method, StatusCode, Uri, header},
    response::{IntoResponse, Response},
};
use data_encoding::BASE64URL_NOPAD;
use futures::{StreamExt, stream};
use serde_json::{Value, json};

use super::{
    Conduct, Fault, Shared, Taken, Verb, lock,
    selector::Selector,
    store::{Cursor, Kind, Object, status},
    watch,
};

/// What a client asks for, in its query.
pub struct Query(BTreeMap<String, String>);

impl Query {
    fn of(uri: &Uri) -> Self {
        let pairs = uri.query().unwrap_or_default().split('&').filter_map(|pair| pair.split_once('='));
        Self(pairs.map(|(name, value)| (decode(name), decode(value))).collect())
    }

    /// A value, or nothing.
    pub fn get(&self, name: &str) -> &str {
        self.0.get(name).map(String::as_str).unwrap_or_default()
    }

    /// A switch.
    pub fn is(&self, name: &str) -> bool {
        matches!(self.get(name), "true" | "1")
    }
}

/// Undoes percent encoding.
fn decode(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        let hex =
            |digit: Option<u8>| digit.and_then(|digit| char::from(digit).to_digit(16)).unwrap_or(0) as u8;
        bytes.push(match byte {
            b'%' => hex(rest.next()) << 4 | hex(rest.next()),
            b'+' => b' ',
            byte => byte,
        });
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Answers a request, or, as the fault of the moment wants it, doesn't.
pub async fn answer(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let conduct = shared.conduct.borrow().clone();
    match conduct.fault {
        Some(Fault::Hang) => return std::future::pending().await,
        Some(Fault::Slow(by)) => tokio::time::sleep(by).await,
        Some(Fault::Code(code)) => return failing(code),
        Some(Fault::Away | Fault::Half) | None => {}
    }
    let bearer = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    if bearer.and_then(|value| value.strip_prefix("Bearer ")) != Some(&shared.token) {
        return refuse(401, "Unauthorized", "Unauthorized");
    }
    let answer = route(shared, request, &conduct).await;
    if conduct.fault == Some(Fault::Half) { half(answer).await } else { answer }
}

/// An answer whose second half never comes; refusals are short.
async fn half(answer: Response) -> Response {
    if !answer.status().is_success() {
        return answer;
    }
    let (mut parts, body) = answer.into_parts();
    let Some(length) = body.size_hint().exact() else { return Response::from_parts(parts, body) };
    let text = to_bytes(body, usize::MAX).await.unwrap_or_default();
    parts.headers.insert(header::CONTENT_LENGTH, length.into());
    let first: Result<_, Infallible> = Ok(text.slice(..text.len() / 2));
    let pending = stream::once(async { first }).chain(stream::pending());
    Response::from_parts(parts, Body::from_stream(pending))
}

async fn route(shared: Arc<Shared>, request: Request, conduct: &Conduct) -> Response {
    let path = request.uri().path().to_owned();
    let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
    let (group, rest) = match parts.as_slice() {
        ["api", "v1", rest @ ..] => ("v1".to_owned(), rest),
        ["apis", group, version, rest @ ..] => (format!("{group}/{version}"), rest),
        _ => return not_found(),
    };
    let (namespace, plural, name) = match rest {
        ["namespaces", namespace, plural] => (Some(*namespace), *plural, None),
        ["namespaces", namespace, plural, name] => (Some(*namespace), *plural, Some(*name)),
        [plural] => (None, *plural, None),
        _ => return not_found(),
    };
    if plural == "events" && matches!(group.as_str(), "v1" | "events.k8s.io/v1") {
        return event(&shared, request, namespace.unwrap_or("default"), name).await;
    }
    let mut kinds = Kind::ALL.into_iter().filter(|kind| !conduct.unknown.contains(kind));
    let Some(kind) = kinds.find(|kind| kind.plural() == plural && kind.api_version() == group) else {
        return not_found();
    };
    if conduct.forbidden.contains(&kind) {
        let who = "User \"agent\" cannot list resource";
        let message = format!("{plural} is forbidden: {who} {plural:?} in API group at the cluster scope");
        return refuse(403, "Forbidden", &message);
    }
    if request.method() != Method::GET || name.is_some() {
        return refuse(
            405,
            "MethodNotAllowed",
            "the server does not allow this method on the requested resource",
        );
    }
    let query = Query::of(request.uri());
    match Selector::parse(kind, query.get("labelSelector"), query.get("fieldSelector")) {
        Err(message) => refuse(400, "BadRequest", &message),
        Ok(selector) => {
            let scope = Scope { kind, namespace: namespace.map(Into::into), selector };
            note(&shared, kind, &query);
            if query.is("watch") {
                watch::start(shared, scope, &query)
            } else {
                list(&shared, &scope, &query)
            }
        }
    }
}

/// Which objects a request is about.
pub struct Scope {
    /// Of this kind.
    pub kind: Kind,
    /// In this namespace, or all.
    pub namespace: Option<String>,
    /// Those that match.
    pub selector: Selector,
}

fn note(shared: &Shared, kind: Kind, query: &Query) {
    let verb = match (query.is("watch"), query.is("sendInitialEvents")) {
        (true, true) => Verb::WatchList,
        (true, false) => Verb::Watch,
        (false, _) if !query.get("continue").is_empty() => Verb::Page,
        (false, _) if query.get("limit") == "1" => Verb::Peek,
        (false, _) => Verb::List,
    };
    lock(&shared.taken).push(Taken { kind, verb });
}

fn list(shared: &Shared, scope: &Scope, query: &Query) -> Response {
    let cursor = match query.get("continue") {
        "" => None,
        token => match read_cursor(token) {
            Some(cursor) => Some(cursor),
            None => return refuse(400, "BadRequest", "continue key is not valid"),
        },
    };
    let limit = query.get("limit").parse().unwrap_or(0);
    let page =
        lock(&shared.store).page(scope.kind, scope.namespace.as_deref(), &scope.selector, limit, cursor);
    let Ok(page) = page else {
        let message = "The provided continue parameter is too old to display a consistent list result.";
        return refuse(410, "Expired", message);
    };
    let mut metadata = json!({"resourceVersion": page.version.to_string()});
    if let Some(next) = &page.next {
        metadata["continue"] = write_cursor(next).into();
        if scope.selector.is_empty() {
            metadata["remainingItemCount"] = page.remaining.into();
        }
    }
    let items: Vec<&str> = page.objects.iter().map(|object| object.text.as_str()).collect();
    let (kind, version) = (scope.kind.name(), scope.kind.api_version());
    json_response(
        200,
        format!(
            r#"{{"kind":"{kind}List","apiVersion":"{version}","metadata":{metadata},"items":[{}]}}"#,
            items.join(",")
        ),
    )
}

fn write_cursor(cursor: &Cursor) -> String {
    BASE64URL_NOPAD.encode(json!([cursor.version, cursor.after.0, cursor.after.1]).to_string().as_bytes())
}

fn read_cursor(token: &str) -> Option<Cursor> {
    let text = BASE64URL_NOPAD.decode(token.as_bytes()).ok()?;
    let (version, namespace, name) = serde_json::from_slice(&text).ok()?;
    Some(Cursor { version, after: (namespace, name) })
}

/// Takes an Event, or what is new of one.
async fn event(shared: &Shared, request: Request, namespace: &str, name: Option<&str>) -> Response {
    let (parts, body) = request.into_parts();
    let body = to_bytes(body, 1 << 20).await.unwrap_or_default();
    let Ok(mut value) = serde_json::from_slice::<Value>(&body) else {
        return refuse(400, "BadRequest", "the object provided is unrecognized");
    };
    let mut events = lock(&shared.events);
    let place = |event: &&mut Value| {
        event["metadata"]["namespace"] == namespace
            && name.is_some_and(|name| event["metadata"]["name"] == name)
    };
    match (parts.method, events.iter_mut().find(place)) {
        (Method::POST, _) if value["metadata"]["namespace"].as_str().unwrap_or(namespace) != namespace => {
            refuse(
                400,
                "BadRequest",
                "the namespace of the provided object does not match the namespace sent on the request",
            )
        }
        (Method::POST, _) => {
            value["metadata"]["namespace"] = namespace.into();
            value["metadata"]["resourceVersion"] = "1".into();
            events.push(value.clone());
            json_response(201, value.to_string())
        }
        (Method::PATCH, Some(known)) => {
            merge(known, &value);
            json_response(200, known.to_string())
        }
        (Method::PATCH, None) => not_found(),
        _ => {
            refuse(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")
        }
    }
}

/// RFC 7386.
fn merge(target: &mut Value, patch: &Value) {
    let Some(fields) = patch.as_object() else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    for (name, value) in fields {
        if value.is_null() {
            target.as_object_mut().map(|target| target.shift_remove(name));
        } else {
            merge(&mut target[name], value);
        }
    }
}

fn failing(code: u16) -> Response {
    let mut response = match code {
        429 => refuse(429, "TooManyRequests", "too many requests, please try again later"),
        code => {
            refuse(code, "InternalError", "an error on the server has prevented the request from succeeding")
        }
    };
    if code == 429 {
        response.headers_mut().insert(header::RETRY_AFTER, header::HeaderValue::from_static("1"));
    }
    response
}

fn not_found() -> Response {
    refuse(404, "NotFound", "the server could not find the requested resource")
}

/// An answer that is a `Status`.
pub fn refuse(code: u16, reason: &str, message: &str) -> Response {
    json_response(code, status(code, reason, message).to_string())
}

fn json_response(code: u16, text: String) -> Response {
    let code = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    (code, [(header::CONTENT_TYPE, "application/json")], Body::from(text)).into_response()
}

/// One line of a watch.
pub fn line(what: &str, kind: Kind, object: &Object) -> String {
    raw_line(what, &object.typed(kind))
}

/// One line of a watch, of something that is no object of the store.
pub fn raw_line(what: &str, object: &str) -> String {
    format!("{{\"type\":\"{what}\",\"object\":{object}}}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_decoded() {
        let uri = "/api/v1/services?watch=true&labelSelector=%21a.io%2Fb&limit=".parse().unwrap();
        let query = Query::of(&uri);
        assert!(query.is("watch"));
        assert_eq!((query.get("labelSelector"), query.get("limit"), query.get("x")), ("!a.io/b", "", ""));
    }

    #[test]
    fn patches_merge() {
        let mut target = json!({"a": {"b": 1, "c": 2}, "d": 3});
        merge(&mut target, &json!({"a": {"b": null, "e": {"f": null, "g": 4}}, "d": [5]}));
        assert_eq!(target, json!({"a": {"c": 2, "e": {"g": 4}}, "d": [5]}));
    }
}
