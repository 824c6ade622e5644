//! The configuration file: kube-proxy's own, read as it is, with a section of ours.

pub mod conntrack;
pub mod fields;
pub mod in_force;
pub mod kube_proxy;
pub mod settings;
#[cfg(test)]
mod tests;
pub mod watch;

use std::{fs, path::Path};

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tracing::{info, warn};

use self::{fields::Here, kube_proxy::KubeProxyConfiguration, settings::Settings};

const API_VERSION: &str = "kubeproxy.config.k8s.io/v1alpha1";
const KIND: &str = "KubeProxyConfiguration";

/// A file, read.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct File {
    /// What it says.
    pub configuration: KubeProxyConfiguration,
    document: Value,
}

impl File {
    /// Reads a file.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        Self::parse(&text).with_context(|| path.display().to_string())
    }

    /// Reads its text, YAML or JSON.
    pub fn parse(text: &str) -> Result<Self> {
        let document: Value = serde_yaml_ng::from_str(text)?;
        let field = |name: &str| document[name].as_str().unwrap_or_default().to_owned();
        let (version, kind) = (field("apiVersion"), field("kind"));
        if version != API_VERSION || kind != KIND {
            bail!("apiVersion {version:?} and kind {kind:?} are not {API_VERSION} and {KIND}");
        }
        let configuration: KubeProxyConfiguration = serde_path_to_error::deserialize(&document)
            .map_err(|error| anyhow::anyhow!("{}: {}", error.path(), error.inner()))?;
        let ours = fields::given(&document).into_iter();
        let unknown: Vec<String> = ours
            .filter(|(path, _, here)| here.is_none() && path.starts_with("lb."))
            .map(|(path, ..)| path)
            .collect();
        if !unknown.is_empty() {
            bail!("{}: no such field; `lb-agent config check --all` lists all", unknown.join(", "));
        }
        Ok(Self { configuration, document })
    }

    /// One warning about all that has no effect.
    pub fn warn(&self, path: &Path) {
        let (nothing, unknown) = self.without_effect();
        if !nothing.is_empty() || !unknown.is_empty() {
            warn!(
                file = %path.display(),
                without_meaning_here = nothing.join(", "),
                unknown = unknown.join(", "),
                "fields have no effect; `lb-agent config check` says why"
            );
        }
    }

    /// Fields that ask for something without meaning here, and unknown ones.
    pub fn without_effect(&self) -> (Vec<String>, Vec<String>) {
        let given = fields::given(&self.document);
        let named = |wanted: fn(&Option<Here>) -> bool| -> Vec<String> {
            let asking = given.iter().filter(|(_, value, here)| wanted(here) && !fields::asks_nothing(value));
            asking.map(|(path, ..)| path.clone()).collect()
        };
        (named(|here| matches!(here, Some(Here::Nothing(_)))), named(Option::is_none))
    }

    /// Fields that are not the same in both.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let (before, after) = (fields::given(&self.document), fields::given(&other.document));
        let gone = before.iter().filter(|(path, ..)| !after.iter().any(|(there, ..)| there == path));
        let changed = after.iter().filter(|field| !before.contains(field));
        changed.chain(gone).map(|(path, ..)| path.clone()).collect()
    }
}

/// A configuration, checked; what is wrong is said all at once.
pub fn settings(configuration: &KubeProxyConfiguration) -> Result<Settings> {
    Settings::of(configuration).map_err(|problems| {
        let lines: Vec<String> = problems.iter().map(ToString::to_string).collect();
        anyhow::anyhow!("{}", lines.join("; "))
    })
}

/// Writes a configuration as a file.
pub fn write(configuration: &KubeProxyConfiguration, path: &Path) -> Result<()> {
    let mut document = serde_json::json!({ "apiVersion": API_VERSION, "kind": KIND });
    let fields = serde_json::to_value(configuration)?;
    if let (Some(document), Value::Object(fields)) = (document.as_object_mut(), fields) {
        document.extend(fields);
    }
    let text = serde_yaml_ng::to_string(&document)?;
    fs::write(path, text).with_context(|| format!("write {}", path.display()))
}

/// Says what each field of a file does here; an error if it can't be used.
pub fn check(path: &Path, all: bool) -> Result<String> {
    let file = File::read(path)?;
    let given = fields::given(&file.document);
    let (mut text, mut unknown) = (String::new(), Vec::new());
    for (field, value, here) in &given {
        match here {
            Some(here) => text += &format!("{field}: {value}\n    {}\n", explained(*here)),
            None => unknown.push(field.as_str()),
        }
    }
    if all {
        let others = fields::FIELDS.iter().filter(|(field, _)| given.iter().all(|(path, ..)| path != field));
        others.for_each(|(field, here)| text += &format!("{field}\n    {}\n", explained(*here)));
    }
    if !unknown.is_empty() {
        text += &format!("unknown, without effect: {}\n", unknown.join(", "));
    }
    let settings = settings(&file.configuration).with_context(|| path.display().to_string())?;
    for problem in &settings.not_looked_at {
        text += &format!("wrong, but of a mode that is not asked for: {problem}\n");
    }
    Ok(text)
}

fn explained(here: Here) -> String {
    match here {
        Here::Does(what) => what.to_owned(),
        Here::Nothing(why) => format!("no meaning here: {why}"),
    }
}

/// How the kernel's OOM killer weighs this process.
pub fn set_oom_score(score: i32) {
    if let Err(error) = fs::write("/proc/self/oom_score_adj", score.to_string()) {
        info!(%error, score, "oomScoreAdj is left as it is: it takes CAP_SYS_RESOURCE");
    }
}
