//! Objects that can't be read, told apart from those that can.

use kube::{
    Resource,
    core::{ObjectMeta, PartialObjectMeta, error_boundary::InvalidObject},
};
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeOwned, Error},
};
use serde_json::value::RawValue;

/// An object, or its metadata and what is wrong with it: one that can't be read does not end a list or a watch.
///
/// What `kube::core::DeserializeGuard` does for every format this does for JSON, several times as fast: the text is kept
/// until the object is read, not a tree of it (`bench wire` has both).
#[derive(Clone, Debug)]
pub struct Readable<K>(pub Result<K, InvalidObject>);

impl<'de, K: DeserializeOwned> Deserialize<'de> for Readable<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <&RawValue>::deserialize(deserializer)?.get();
        if let Ok(object) = serde_json::from_str(text) {
            return Ok(Self(Ok(object)));
        }
        let bare: PartialObjectMeta = serde_json::from_str(text).map_err(Error::custom)?;
        Ok(Self(Err(InvalidObject { error: problem::<K>(text), metadata: bare.metadata })))
    }
}

/// What is wrong with an object, and at which of its fields. Where on the wire that was helps nobody, and would be another
/// problem each time the object comes.
fn problem<K: DeserializeOwned>(text: &str) -> String {
    match serde_path_to_error::deserialize::<_, K>(&mut serde_json::Deserializer::from_str(text)) {
        Ok(_) => "it can't be read".into(),
        Err(error) => {
            let (path, what) = (error.path().to_string(), error.inner().to_string());
            let what = what.rsplit_once(" at line ").map_or(&*what, |(what, _)| what);
            format!("{path}: {what}")
        }
    }
}

impl<K: Resource> Resource for Readable<K> {
    type DynamicType = K::DynamicType;
    type Scope = K::Scope;

    fn kind(dt: &K::DynamicType) -> std::borrow::Cow<'_, str> {
        K::kind(dt)
    }

    fn group(dt: &K::DynamicType) -> std::borrow::Cow<'_, str> {
        K::group(dt)
    }

    fn version(dt: &K::DynamicType) -> std::borrow::Cow<'_, str> {
        K::version(dt)
    }

    fn plural(dt: &K::DynamicType) -> std::borrow::Cow<'_, str> {
        K::plural(dt)
    }

    fn meta(&self) -> &ObjectMeta {
        self.0.as_ref().map_or_else(|invalid| &invalid.metadata, K::meta)
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        self.0.as_mut().map_or_else(|invalid| &mut invalid.metadata, K::meta_mut)
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Service;

    use super::*;

    fn read(text: &str) -> serde_json::Result<Readable<Service>> {
        serde_json::from_str(text)
    }

    #[test]
    fn what_cant_be_read_is_named_with_its_field() {
        let head =
            r#"{"apiVersion":"v1","kind":"Service","metadata":{"name":"web","namespace":"shop"},"spec":"#;
        let good = read(&format!(r#"{head}{{"clusterIP":"10.96.0.1"}}}}"#)).unwrap();
        assert_eq!(good.0.unwrap().spec.unwrap().cluster_ip.as_deref(), Some("10.96.0.1"));
        let bad = read(&format!(r#"{head}{{"ports":[{{"port":80}},{{"port":"http"}}]}}}}"#)).unwrap();
        assert_eq!(bad.meta().name.as_deref(), Some("web"));
        let error = bad.0.unwrap_err().error;
        assert_eq!(error, r#"spec.ports[1].port: invalid type: string "http", expected i32"#);
    }

    #[test]
    fn without_metadata_there_is_no_object() {
        assert!(read(r#"{"metadata":"none"}"#).is_err());
        assert!(read(r#"{"metadata":{"name":"web"}"#).is_err(), "cut off");
    }
}
