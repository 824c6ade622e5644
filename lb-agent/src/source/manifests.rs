//! Objects from a folder of YAML and JSON files, watched for changes: a cluster without an API server.
//!
//! A file that can't be read keeps the objects it had when it could.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};
use k8s_openapi::api::{core::v1 as core, discovery::v1 as discovery, networking::v1 as networking};
use lb_core::model::{Event, Warning};
use notify::Watcher;
use serde::Deserialize;
use tokio::sync::mpsc;
use tracing::{debug, info, warn};

use super::{Report, Reports, Source, is_change};
use crate::convert;

/// Files are read again this often even without news: some file systems give none.
const POLL: Duration = Duration::from_secs(10);
/// Writers take a moment to finish a file.
const SETTLE: Duration = Duration::from_millis(30);

/// A file, and all that is wrong with it now.
type FileWarnings = (String, Vec<Warning>);

/// A folder of manifests.
pub struct Manifests {
    dir: PathBuf,
    files: BTreeMap<PathBuf, FileState>,
}

#[derive(Default)]
struct FileState {
    text: String,
    objects: BTreeMap<Key, Event>,
    warnings: Vec<Warning>,
}

/// Kind, namespace, name.
type Key = (&'static str, String, String);

impl Manifests {
    /// Reads `dir`; not its subfolders.
    pub fn new(dir: PathBuf) -> Self {
        Self { dir, files: BTreeMap::new() }
    }

    /// Reads all files and says what changed since the last time.
    pub fn scan(&mut self) -> Result<(Vec<Event>, Vec<FileWarnings>)> {
        let before = self.objects();
        let mut texts = BTreeMap::new();
        let entries =
            fs::read_dir(&self.dir).with_context(|| format!("read folder {}", self.dir.display()))?;
        for entry in entries {
            let path = entry.with_context(|| format!("read folder {}", self.dir.display()))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let is_manifest = [".yaml", ".yml", ".json"].iter().any(|ending| name.ends_with(ending));
            if !name.starts_with('.') && is_manifest {
                texts.insert(path.clone(), fs::read_to_string(&path));
            }
        }
        let mut warnings = Vec::new();
        self.files.retain(|path, _| {
            let kept = texts.contains_key(path);
            if !kept {
                warnings.push((path.display().to_string(), Vec::new()));
            }
            kept
        });
        for (path, text) in texts {
            let state = self.files.entry(path.clone()).or_default();
            let known = state.warnings.clone();
            match text {
                Ok(text) if text != state.text => state.read(&path, text),
                Ok(_) => {}
                Err(error) => {
                    state.warnings =
                        vec![file_warning(&path, "file", format!("{error}; its last state stays"))];
                }
            }
            if state.warnings != known {
                warnings.push((path.display().to_string(), state.warnings.clone()));
            }
        }
        Ok((difference(&before, &self.objects()), warnings))
    }

    fn objects(&self) -> BTreeMap<Key, Event> {
        self.files.values().flat_map(|file| file.objects.clone()).collect()
    }
}

impl FileState {
    /// Takes a file's text in; if any of its documents is broken, the objects stay as they were.
    fn read(&mut self, path: &Path, text: String) {
        self.warnings.clear();
        match parse(path, &text, &mut self.warnings) {
            Some(objects) => self.objects = objects,
            None => debug!(path = %path.display(), "broken; its last state stays"),
        }
        self.text = text;
    }
}

/// All objects of a file, or `None` if a document is broken.
fn parse(path: &Path, text: &str, warnings: &mut Vec<Warning>) -> Option<BTreeMap<Key, Event>> {
    let mut objects = BTreeMap::new();
    let mut problems = Vec::new();
    for (index, document) in serde_yaml_ng::Deserializer::from_str(text).enumerate() {
        let number = index + 1;
        let value = match serde_yaml_ng::Value::deserialize(document) {
            Ok(value) => value,
            Err(error) => {
                problems.push(file_warning(path, &format!("document {number}"), last_state_stays(&error)));
                // The parser can't find the next document behind broken YAML.
                break;
            }
        };
        if value.is_null() {
            continue;
        }
        let items = match value.get("kind").and_then(|kind| kind.as_str()) {
            Some("List") => {
                value.get("items").and_then(|items| items.as_sequence()).cloned().unwrap_or_default()
            }
            _ => vec![value],
        };
        for item in items {
            match event(&item, warnings) {
                Ok(Some((key, event))) => drop(objects.insert(key, event)),
                Ok(None) => {}
                Err((field, error)) => {
                    problems.push(file_warning(
                        path,
                        &format!("document {number}{field}"),
                        last_state_stays(&error),
                    ));
                }
            }
        }
    }
    let broken = !problems.is_empty();
    warnings.extend(problems);
    (!broken).then_some(objects)
}

fn last_state_stays(error: &dyn std::fmt::Display) -> String {
    format!("{error}; the file's last good state stays")
}

/// An object as an event; `None` if it is of no interest.
fn event(
    value: &serde_yaml_ng::Value,
    warnings: &mut Vec<Warning>,
) -> Result<Option<(Key, Event)>, (String, String)> {
    let text = |key: &str| value.get(key).and_then(|text| text.as_str()).unwrap_or_default().to_owned();
    let kind = text("kind");
    if kind.is_empty() {
        return Err((", kind".into(), "missing".into()));
    }
    let meta = value.get("metadata");
    let named =
        meta.and_then(|meta| meta.get("name")).and_then(|name| name.as_str()).unwrap_or_default().to_owned();
    if named.is_empty() {
        return Err((", metadata.name".into(), format!("{kind} without a name")));
    }
    let failed = |(path, error): (String, String)| (format!(", {kind} {named}, {path}"), error);
    Ok(match kind.as_str() {
        "Service" => {
            let object: core::Service = typed(value).map_err(failed)?;
            let name = convert::name(&object.metadata);
            convert::service(&object, warnings)
                .map(|service| (key("Service", &name), Event::Service(service)))
        }
        "EndpointSlice" => {
            let mut object: discovery::EndpointSlice = typed(value).map_err(failed)?;
            // As an API server does, which has not seen this one.
            for port in object.ports.iter_mut().flatten() {
                port.name.get_or_insert_default();
            }
            let name = convert::name(&object.metadata);
            convert::endpoint_slice(&object, warnings)
                .map(|slice| (key("EndpointSlice", &name), Event::EndpointSlice(slice)))
        }
        "Node" => {
            let object: core::Node = typed(value).map_err(failed)?;
            let node = convert::node(&object, warnings);
            Some((("Node", String::new(), node.name.to_string()), Event::Node(node)))
        }
        "ServiceCIDR" => {
            let object: networking::ServiceCIDR = typed(value).map_err(failed)?;
            let range = convert::service_cidr(&object, warnings);
            Some((("ServiceCIDR", String::new(), range.name.to_string()), Event::ServiceCidr(range)))
        }
        "Pod" => {
            let object: core::Pod = typed(value).map_err(failed)?;
            let pod = convert::pod(&object, warnings);
            Some((key("Pod", &pod.name), Event::Pod(pod)))
        }
        other => {
            debug!(kind = other, name = named, "ignored");
            None
        }
    })
}

/// A value as an object; the error names the field.
fn typed<T: serde::de::DeserializeOwned>(value: &serde_yaml_ng::Value) -> Result<T, (String, String)> {
    serde_path_to_error::deserialize(value.clone())
        .map_err(|error| (error.path().to_string(), error.inner().to_string()))
}

fn key(kind: &'static str, name: &lb_core::model::ObjectName) -> Key {
    (kind, name.namespace.to_string(), name.name.to_string())
}

/// Events that lead from one set of objects to another.
fn difference(before: &BTreeMap<Key, Event>, after: &BTreeMap<Key, Event>) -> Vec<Event> {
    let gone =
        before.iter().filter(|(key, _)| !after.contains_key(*key)).map(|(_, event)| match event.clone() {
            Event::Service(service) => Event::ServiceGone(service.name),
            Event::EndpointSlice(slice) => Event::EndpointSliceGone(slice.name),
            Event::Node(node) => Event::NodeGone(node.name),
            Event::ServiceCidr(range) => Event::ServiceCidrGone(range.name),
            Event::Pod(pod) => Event::PodGone(pod.name),
            other => other,
        });
    let changed =
        after.iter().filter(|(key, event)| before.get(*key) != Some(event)).map(|(_, event)| event.clone());
    gone.chain(changed).collect()
}

fn file_warning(path: &Path, field: &str, problem: String) -> Warning {
    Warning { object: path.display().to_string(), field: field.into(), problem }
}

impl Source for Manifests {
    async fn run(mut self, reports: Reports) -> Result<()> {
        let (wake, mut woken) = mpsc::channel(1);
        let mut watcher = notify::recommended_watcher(move |event| {
            if is_change(event) {
                // Full: a wake-up is on its way already.
                let _ = wake.try_send(());
            }
        })
        .context("watch for file changes")?;
        watcher
            .watch(&self.dir, notify::RecursiveMode::NonRecursive)
            .with_context(|| format!("watch folder {}", self.dir.display()))?;
        let mut synced = false;
        loop {
            match self.scan() {
                Ok((events, warnings)) => {
                    for (origin, warnings) in warnings {
                        reports.send(Report::Warnings(origin, warnings)).await?;
                    }
                    if !events.is_empty() {
                        info!(events = events.len(), files = self.files.len(), "manifests changed");
                        reports.send(Report::Changed(events)).await?;
                    }
                    if !synced {
                        synced = true;
                        reports.send(Report::Synced).await?;
                    }
                }
                Err(error) if synced => {
                    warn!(error = %format!("{error:#}"), "manifests are not readable; the last state stays");
                }
                Err(error) => return Err(error),
            }
            tokio::select! {
                Some(()) = woken.recv() => tokio::time::sleep(SETTLE).await,
                () = tokio::time::sleep(POLL) => {}
                () = reports.closed() => return Ok(()),
            }
            while woken.try_recv().is_ok() {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let dir = std::env::temp_dir().join(format!("lb-manifests-{}-{name}", std::process::id()));
            fs::create_dir_all(&dir).unwrap();
            Self(dir)
        }
        fn write(&self, file: &str, text: &str) {
            fs::write(self.0.join(file), text).unwrap();
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    const TWO: &str = "kind: Service\nmetadata: {name: a}\nspec: {clusterIP: 10.0.0.1}\n---\nkind: Node\nmetadata: {name: n}\n";

    #[test]
    fn only_changes_are_reported() {
        let folder = Folder::new("changes");
        folder.write("a.yaml", TWO);
        folder.write("notes.txt", "not a manifest");
        let mut manifests = Manifests::new(folder.0.clone());
        assert_eq!(manifests.scan().unwrap().0.len(), 2);
        assert_eq!(manifests.scan().unwrap().0, []);
        folder.write("a.yaml", TWO.split("---").next().unwrap());
        assert!(matches!(&manifests.scan().unwrap().0[..], [Event::NodeGone(name)] if **name == *"n"));
        fs::remove_file(folder.0.join("a.yaml")).unwrap();
        assert!(matches!(&manifests.scan().unwrap().0[..], [Event::ServiceGone(_)]));
    }

    #[test]
    fn a_broken_file_keeps_its_last_state_and_is_named() {
        let folder = Folder::new("broken");
        folder.write("a.yaml", TWO);
        let mut manifests = Manifests::new(folder.0.clone());
        manifests.scan().unwrap();
        folder.write(
            "a.yaml",
            "kind: Service\nmetadata: {name: a}\n---\nkind: Service\nmetadata: {name: b}\nspec: {ports: 7}\n",
        );
        let (events, warnings) = manifests.scan().unwrap();
        assert_eq!(events, []);
        let text = warnings[0].1[0].to_string();
        assert!(text.contains("a.yaml: document 2, Service b, spec.ports: invalid type"), "{text}");
        folder.write("a.yaml", TWO);
        let (events, warnings) = manifests.scan().unwrap();
        assert_eq!((events.len(), warnings[0].1.len()), (0, 0), "cleared");
    }

    #[test]
    fn lists_and_json_are_read() {
        let folder = Folder::new("list");
        folder.write("a.json", r#"{"kind":"List","items":[{"kind":"Node","metadata":{"name":"n"}},{"kind":"Secret","metadata":{"name":"s"}}]}"#);
        assert_eq!(Manifests::new(folder.0.clone()).scan().unwrap().0.len(), 1);
    }
}
