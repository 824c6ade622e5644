//! `probe`: what this machine can, which modes therefore work, and which of them `--mode auto` takes.
//!
//! Things are tried rather than looked up: our own programs and rules are loaded in a network namespace that is gone
//! afterwards. [`read`] tries, [`verdict`] judges.

pub mod read;
pub mod verdict;

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use serde::Serialize;
use tracing::info;

use self::verdict::{Verdict, Works, verdicts};
use crate::{
    args::{Mode, Output},
    print,
};

/// What is looked at, in the order of the report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum What {
    /// Its version.
    Kernel,
    /// Capabilities to load and attach programs.
    BpfPrivileges,
    /// Capabilities to write rules.
    NetPrivileges,
    /// The file system of pins.
    Bpffs,
    /// The kernel's own types.
    Btf,
    /// Our BPF programs load.
    Programs,
    /// They can be attached to devices behind XDP.
    Tc,
    /// They can be attached before it.
    Xdp,
    /// Where sockets are grouped.
    Cgroup2,
    /// Programs can be attached to the sockets of a cgroup.
    SocketHooks,
    /// The program nft.
    Nft,
    /// Our nftables tables load.
    NftablesRules,
    /// The programs of one variant.
    Iptables,
    /// Our iptables rules load.
    IptablesRules,
    /// The same for IPv6.
    Ip6tablesRules,
    /// The kernel's virtual servers.
    IpVs,
    /// The program that writes virtual servers.
    Ipvsadm,
    /// The program ipset.
    Ipset,
    /// Dummy devices.
    Dummy,
}

/// Whether something is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Found {
    /// It is.
    Yes,
    /// It isn't.
    No,
    /// It could not be tried.
    Unknown,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Whether it is there.
    pub found: Found,
    /// Version, path, or what went wrong.
    pub detail: String,
}

impl Finding {
    fn yes(detail: impl Into<String>) -> Self {
        Self { found: Found::Yes, detail: detail.into() }
    }

    fn no(detail: impl Into<String>) -> Self {
        Self { found: Found::No, detail: detail.into() }
    }

    fn unknown(detail: impl Into<String>) -> Self {
        Self { found: Found::Unknown, detail: detail.into() }
    }
}

/// Everything that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Major and minor version of the kernel.
    pub kernel: (u32, u32),
    /// What was found.
    pub findings: BTreeMap<What, Finding>,
}

impl Facts {
    fn get(&self, what: What) -> (Found, &str) {
        self.findings.get(&what).map_or((Found::Unknown, "not looked at"), |it| (it.found, &it.detail))
    }
}

/// A line of the report.
#[derive(Serialize)]
struct Row<'a> {
    what: What,
    found: Found,
    detail: &'a str,
}

/// Prints the report.
pub fn report(facts: &Facts, output: Output) -> Result<()> {
    let rows: Vec<Row<'_>> = facts
        .findings
        .iter()
        .map(|(what, finding)| Row { what: *what, found: finding.found, detail: &finding.detail })
        .collect();
    let verdicts = verdicts(facts);
    let picked = verdict::pick(&verdicts);
    if output == Output::Json {
        let auto = picked.map(|verdict| verdict.mode);
        let json = serde_json::json!({ "found": rows, "modes": verdicts, "auto": auto });
        println!("{}", serde_json::to_string_pretty(&json)?);
        return Ok(());
    }
    print!("{}\n{}\n\n", print::table(&rows)?, said(&verdicts, "\n"));
    match picked {
        Some(verdict) if verdict.works == Works::Yes => {
            println!("run --mode auto takes {}, the first that works.", verdict.mode);
        }
        Some(verdict) => println!("run --mode auto takes {}: none is known to work whole.", verdict.mode),
        None => println!("run --mode auto fails: no mode can work."),
    }
    Ok(())
}

fn said(verdicts: &[Verdict], between: &str) -> String {
    verdicts.iter().map(ToString::to_string).collect::<Vec<_>>().join(between)
}

/// The mode for `--mode auto`, with a line about each.
pub fn auto(facts: &Facts) -> Result<Mode> {
    let verdicts = verdicts(facts);
    match verdict::pick(&verdicts).and_then(|verdict| verdict.runs) {
        Some(mode) => {
            info!(?mode, because = said(&verdicts, ", "), "mode auto");
            Ok(mode)
        }
        None => bail!(
            "no mode works on this machine: {}; `lb-agent probe` shows what was tried",
            said(&verdicts, ", ")
        ),
    }
}
