//! kube-proxy's command line (1.36, `cmd/kube-proxy/app/options.go`) as ours.

use std::{ffi::OsString, path::Path};

/// A DaemonSet that says `kube-proxy --config=…` gets `run`, with what kube-proxy makes of its options.
///
/// For every `run` an option with an empty value is one that isn't given, and `_` in the name of an option is `-`.
pub fn command_line(typed: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut words: Vec<OsString> = typed.collect();
    let in_its_place = is_in_its_place(&words);
    if !in_its_place && !words.iter().any(|word| word == "run") {
        return words;
    }
    let options = given(words.split_off(1));
    if !in_its_place {
        words.extend(options);
    } else if options.iter().any(|word| asks_for_version(&word.to_string_lossy())) {
        words.push("--version".into());
    } else {
        let (options, ignored) = looked_at(options);
        words.extend(["run", "--in-kube-proxys-place"].map(OsString::from));
        if !ignored.is_empty() {
            words.push(format!("--not-looked-at={}", ignored.join(",")).into());
        }
        words.extend(options);
    }
    words
}

/// Called by its name, and not with a command of ours.
fn is_in_its_place(words: &[OsString]) -> bool {
    let name = words.first().and_then(|program| Path::new(program).file_name());
    let is_option = words.get(1).is_none_or(|word| word.to_string_lossy().starts_with('-'));
    name.is_some_and(|name| name == "kube-proxy") && is_option
}

/// kube-proxy: `--version`, `--version=raw`, and what Go takes for a boolean.
fn asks_for_version(word: &str) -> bool {
    let value = word.strip_prefix("--version").map(|rest| rest.strip_prefix('=').unwrap_or(rest));
    value.is_some_and(|value| ["", "raw", "true", "True", "TRUE", "t", "T", "1"].contains(&value))
}

/// Options that mean something when their value is empty: nowhere.
const MAY_BE_EMPTY: [&str; 2] = ["--healthz-bind-address", "--metrics-bind-address"];

/// Leaves out options with an empty value, whether that is in the same word or the next.
fn given(words: Vec<OsString>) -> Vec<OsString> {
    let mut given: Vec<OsString> = Vec::with_capacity(words.len());
    for word in words {
        let Some(text) = word.to_str().filter(|text| text.starts_with("--") || text.is_empty()) else {
            given.push(word);
            continue;
        };
        let (name, value) = parts(text);
        let last = given.last().map(|last| last.to_string_lossy().into_owned()).unwrap_or_default();
        match value {
            _ if text.is_empty() && MAY_BE_EMPTY.contains(&&*last) => given.push(word),
            _ if text.is_empty() && last.starts_with("--") && !last.contains('=') => {
                given.pop();
            }
            Some("") if !MAY_BE_EMPTY.contains(&&*name) => {}
            Some(value) => given.push(format!("{name}={value}").into()),
            None => given.push(name.into()),
        }
    }
    given
}

/// An option's name, and its value if that is in the same word.
fn parts(word: &str) -> (String, Option<&str>) {
    let (name, value) = word.split_once('=').map_or((word, None), |(name, value)| (name, Some(value)));
    (name.replace('_', "-"), value)
}

/// Options that kube-proxy does not look at where it has a configuration file.
const IN_THE_FILE: [&str; 41] = [
    "--bind-address",
    "--bind-address-hard-fail",
    "--cluster-cidr",
    "--config-sync-period",
    "--conntrack-max-per-core",
    "--conntrack-min",
    "--conntrack-tcp-be-liberal",
    "--conntrack-tcp-timeout-close-wait",
    "--conntrack-tcp-timeout-established",
    "--conntrack-udp-timeout",
    "--conntrack-udp-timeout-stream",
    "--detect-local-mode",
    "--feature-gates",
    "--healthz-bind-address",
    "--healthz-port",
    "--iptables-localhost-nodeports",
    "--iptables-masquerade-bit",
    "--iptables-min-sync-period",
    "--iptables-sync-period",
    "--ipvs-exclude-cidrs",
    "--ipvs-min-sync-period",
    "--ipvs-scheduler",
    "--ipvs-strict-arp",
    "--ipvs-sync-period",
    "--ipvs-tcp-timeout",
    "--ipvs-tcpfin-timeout",
    "--ipvs-udp-timeout",
    "--kube-api-burst",
    "--kube-api-content-type",
    "--kube-api-qps",
    "--kubeconfig",
    "--masquerade-all",
    "--metrics-bind-address",
    "--metrics-port",
    "--nodeport-addresses",
    "--oom-score-adj",
    "--pod-bridge-interface",
    "--pod-interface-name-prefix",
    "--profiling",
    "--proxy-mode",
    "--show-hidden-metrics-for-version",
];

/// Those of them whose value, if any, is in the same word.
const BOOLEANS: [&str; 6] = [
    "--bind-address-hard-fail",
    "--conntrack-tcp-be-liberal",
    "--iptables-localhost-nodeports",
    "--ipvs-strict-arp",
    "--masquerade-all",
    "--profiling",
];

/// Splits options into those that count and the names of those that don't beside `--config`.
fn looked_at(options: Vec<OsString>) -> (Vec<OsString>, Vec<String>) {
    let is_config = |word: &OsString| parts(&word.to_string_lossy()).0 == "--config";
    let has_file = options.iter().any(is_config);
    let (mut counts, mut ignored) = (Vec::with_capacity(options.len()), Vec::new());
    let mut options = options.into_iter();
    while let Some(word) = options.next() {
        let text = word.to_string_lossy().into_owned();
        let (name, value) = parts(&text);
        if name == "--version" {
            continue;
        }
        if !has_file || !IN_THE_FILE.contains(&&*name) {
            counts.push(word);
            continue;
        }
        if value.is_none() && !BOOLEANS.contains(&&*name) {
            options.next();
        }
        ignored.push(name);
    }
    (counts, ignored)
}
