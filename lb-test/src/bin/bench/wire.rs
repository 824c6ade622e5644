//! What a watch event costs to read, in each form in which an API server can write it.

use std::{
    collections::BTreeMap,
    hint::black_box,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::core::{DeserializeGuard, WatchEvent};
use lb_agent::source::readable::Readable;
use prost::Message;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};

/// Each form is read for so long, so many times in turn with the others; the fastest counts.
const ROUND: Duration = Duration::from_millis(200);
const ROUNDS: usize = 5;

/// Reads one event again and again, from bytes to the object.
pub fn wire(slice: Value) -> Result<Vec<Value>> {
    let slice = as_kept(slice);
    let mut text = serde_json::to_vec(&json!({"type": "MODIFIED", "object": slice}))?;
    text.push(b'\n');
    let frame = frame(&slice)?;
    let forms: [(&str, usize, Read<'_>); 5] = [
        (
            "JSON, all fields, kube's guard",
            text.len(),
            Box::new(|| json::<WatchEvent<DeserializeGuard<EndpointSlice>>>(&text)),
        ),
        (
            "JSON, all fields, our guard",
            text.len(),
            Box::new(|| json::<WatchEvent<Readable<EndpointSlice>>>(&text)),
        ),
        ("JSON, all fields", text.len(), Box::new(|| json::<WatchEvent<EndpointSlice>>(&text))),
        ("JSON, fields in use", text.len(), Box::new(|| json::<WatchEvent<Slice>>(&text))),
        ("protobuf, fields in use", frame.len(), Box::new(|| protobuf(&frame).map(drop))),
    ];
    let mut fastest = [f64::MAX; 5];
    for _ in 0..ROUNDS {
        for ((_, _, read), fastest) in forms.iter().zip(&mut fastest) {
            *fastest = fastest.min(micros(read)?);
        }
    }
    let rows = forms.iter().zip(fastest).map(|((form, bytes, _), micros)| {
        let share = micros * 5_000.0 / 10_000.0;
        json!({
            "case": format!("EndpointSlice of 10 endpoints: {form}"), "bytes": bytes,
            "us": (micros * 10.0).round() / 10.0,
            "percent_of_a_core_at_5000_per_s": (share * 10.0).round() / 10.0,
        })
    });
    Ok(rows.collect())
}

type Read<'a> = Box<dyn Fn() -> Result<()> + 'a>;

/// µs per read.
fn micros(read: &Read<'_>) -> Result<f64> {
    let started = Instant::now();
    let mut reads = 0;
    while started.elapsed() < ROUND {
        for _ in 0..100 {
            read()?;
        }
        reads += 100;
    }
    Ok(started.elapsed().as_secs_f64() * 1e6 / f64::from(reads))
}

fn json<T: DeserializeOwned>(text: &[u8]) -> Result<()> {
    black_box(serde_json::from_slice::<T>(text)?);
    Ok(())
}

/// The slice with the metadata that kube-apiserver and the EndpointSlice controller give it.
fn as_kept(mut slice: Value) -> Value {
    let uid = "22222222-2222-4222-8222-222222222222";
    let name = slice["metadata"]["labels"]["kubernetes.io/service-name"].clone();
    let fields = json!({
        "f:addressType": {}, "f:endpoints": {}, "f:ports": {},
        "f:metadata": {
            "f:annotations": {".": {}, "f:endpoints.kubernetes.io/last-change-trigger-time": {}},
            "f:generateName": {},
            "f:labels": {".": {}, "f:app": {}, "f:endpointslice.kubernetes.io/managed-by": {}, "f:kubernetes.io/service-name": {}},
            "f:ownerReferences": {".": {}, format!("k:{{\"uid\":\"{uid}\"}}"): {}},
        },
    });
    let more = json!({
        "namespace": "default", "uid": uid, "resourceVersion": "123456789", "generation": 17,
        "generateName": format!("{}-", name.as_str().unwrap_or_default()),
        "creationTimestamp": "2026-01-02T03:04:05Z",
        "annotations": {"endpoints.kubernetes.io/last-change-trigger-time": "2026-01-02T03:04:05Z"},
        "ownerReferences": [{"apiVersion": "v1", "kind": "Service", "name": name, "uid": uid, "controller": true, "blockOwnerDeletion": true}],
        "managedFields": [{
            "manager": "kube-controller-manager", "operation": "Update", "apiVersion": "discovery.k8s.io/v1",
            "time": "2026-01-02T03:04:05Z", "fieldsType": "FieldsV1", "fieldsV1": fields,
        }],
    });
    if let (Some(metadata), Value::Object(more)) = (slice["metadata"].as_object_mut(), more) {
        metadata.extend(more);
    }
    slice
}

/// A frame of a watch in protobuf without its length: a `WatchEvent`, in it an object in the envelope of
/// `apimachinery/pkg/runtime/serializer/protobuf`.
fn frame(slice: &Value) -> Result<Vec<u8>> {
    let skipped = Skipped { metadata: Some(SkippedMeta::of(&slice["metadata"])?) };
    let mut slice = Slice::deserialize(slice).context("the slice")?.encode_to_vec();
    // A message that comes twice is one message, so are these fields on the wire.
    skipped.encode(&mut slice)?;
    let unknown = Unknown { raw: slice }.encode_to_vec();
    let object = RawExtension { raw: [MAGIC, &unknown].concat() };
    let frame = WatchFrame { kind: "MODIFIED".into(), object: Some(object) }.encode_to_vec();
    ensure!(protobuf(&frame)?.endpoints.len() == 10, "what was written is read");
    Ok(frame)
}

fn protobuf(frame: &[u8]) -> Result<Slice> {
    let event = WatchFrame::decode(frame)?;
    let object = event.object.context("an object")?.raw;
    let unknown = Unknown::decode(object.strip_prefix(MAGIC).context("an envelope")?)?;
    Ok(black_box(Slice::decode(&*unknown.raw)?))
}

/// Comes before an envelope.
const MAGIC: &[u8] = b"k8s\0";

/// `meta/v1 WatchEvent`.
#[derive(Clone, PartialEq, Message)]
struct WatchFrame {
    #[prost(string, tag = "1")]
    kind: String,
    #[prost(message, optional, tag = "2")]
    object: Option<RawExtension>,
}

#[derive(Clone, PartialEq, Message)]
struct RawExtension {
    #[prost(bytes = "vec", tag = "1")]
    raw: Vec<u8>,
}

/// `runtime.Unknown`, of which the type is left out.
#[derive(Clone, PartialEq, Message)]
struct Unknown {
    #[prost(bytes = "vec", tag = "2")]
    raw: Vec<u8>,
}

/// Of an EndpointSlice what is in use here, with the tags of `discovery/v1/generated.proto`.
#[derive(Clone, PartialEq, Message, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Slice {
    #[prost(message, optional, tag = "1")]
    metadata: Option<Meta>,
    #[prost(message, repeated, tag = "2")]
    endpoints: Vec<Endpoint>,
    #[prost(message, repeated, tag = "3")]
    ports: Vec<Port>,
    #[prost(string, tag = "4")]
    address_type: String,
}

#[derive(Clone, PartialEq, Message, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Meta {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "3")]
    namespace: String,
    #[prost(string, tag = "5")]
    uid: String,
    #[prost(string, tag = "6")]
    resource_version: String,
    #[prost(btree_map = "string, string", tag = "11")]
    labels: BTreeMap<String, String>,
    #[prost(btree_map = "string, string", tag = "12")]
    annotations: BTreeMap<String, String>,
}

/// What else is on the wire, and is passed over.
#[derive(Clone, PartialEq, Message)]
struct Skipped {
    #[prost(message, optional, tag = "1")]
    metadata: Option<SkippedMeta>,
}

#[derive(Clone, PartialEq, Message)]
struct SkippedMeta {
    #[prost(string, tag = "2")]
    generate_name: String,
    #[prost(int64, tag = "7")]
    generation: i64,
    #[prost(message, repeated, tag = "13")]
    owner_references: Vec<Owner>,
    #[prost(message, repeated, tag = "17")]
    managed_fields: Vec<Manager>,
}

#[derive(Clone, PartialEq, Message)]
struct Owner {
    #[prost(string, tag = "1")]
    kind: String,
    #[prost(string, tag = "3")]
    name: String,
    #[prost(string, tag = "4")]
    uid: String,
    #[prost(string, tag = "5")]
    api_version: String,
    #[prost(bool, tag = "6")]
    controller: bool,
    #[prost(bool, tag = "7")]
    block_owner_deletion: bool,
}

#[derive(Clone, PartialEq, Message)]
struct Manager {
    #[prost(string, tag = "1")]
    manager: String,
    #[prost(string, tag = "2")]
    operation: String,
    #[prost(string, tag = "3")]
    api_version: String,
    #[prost(string, tag = "6")]
    fields_type: String,
    #[prost(message, optional, tag = "7")]
    fields: Option<RawExtension>,
}

impl SkippedMeta {
    fn of(metadata: &Value) -> Result<Self> {
        let text = |value: &Value, field: &str| value[field].as_str().unwrap_or_default().to_owned();
        let all = |field: &str| metadata[field].as_array().cloned().unwrap_or_default();
        let owner = |owner: &Value| Owner {
            kind: text(owner, "kind"),
            name: text(owner, "name"),
            uid: text(owner, "uid"),
            api_version: text(owner, "apiVersion"),
            controller: true,
            block_owner_deletion: true,
        };
        let manager = |manager: &Value| Manager {
            manager: text(manager, "manager"),
            operation: text(manager, "operation"),
            api_version: text(manager, "apiVersion"),
            fields_type: text(manager, "fieldsType"),
            fields: Some(RawExtension { raw: manager["fieldsV1"].to_string().into() }),
        };
        Ok(Self {
            generate_name: text(metadata, "generateName"),
            generation: metadata["generation"].as_i64().context("a generation")?,
            owner_references: all("ownerReferences").iter().map(owner).collect(),
            managed_fields: all("managedFields").iter().map(manager).collect(),
        })
    }
}

#[derive(Clone, PartialEq, Message, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Endpoint {
    #[prost(string, repeated, tag = "1")]
    addresses: Vec<String>,
    #[prost(message, optional, tag = "2")]
    conditions: Option<Conditions>,
    #[prost(message, optional, tag = "4")]
    target_ref: Option<Target>,
    #[prost(string, optional, tag = "6")]
    node_name: Option<String>,
    #[prost(string, optional, tag = "7")]
    zone: Option<String>,
}

#[derive(Clone, PartialEq, Message, Deserialize)]
#[serde(default)]
struct Conditions {
    #[prost(bool, optional, tag = "1")]
    ready: Option<bool>,
    #[prost(bool, optional, tag = "2")]
    serving: Option<bool>,
    #[prost(bool, optional, tag = "3")]
    terminating: Option<bool>,
}

#[derive(Clone, PartialEq, Message, Deserialize)]
#[serde(default)]
struct Target {
    #[prost(string, tag = "1")]
    kind: String,
    #[prost(string, tag = "2")]
    namespace: String,
    #[prost(string, tag = "3")]
    name: String,
    #[prost(string, tag = "4")]
    uid: String,
}

#[derive(Clone, PartialEq, Message, Deserialize)]
#[serde(default)]
struct Port {
    #[prost(string, optional, tag = "1")]
    name: Option<String>,
    #[prost(string, optional, tag = "2")]
    protocol: Option<String>,
    #[prost(int32, optional, tag = "3")]
    port: Option<i32>,
}
