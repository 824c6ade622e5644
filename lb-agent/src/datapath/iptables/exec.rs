//! The iptables programs: which of them this machine's rules are in, and how they are called.

use std::{
    collections::BTreeSet,
    process::{Command, Stdio},
    sync::Arc,
};

use lb_core::{
    model::Family,
    rules::{
        iptables::{Chain, Table},
        names,
    },
};

use crate::datapath::{DatapathError, program};

/// Which kernel interface the programs write to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// nf_tables, through `iptables-nft`.
    Nft,
    /// xtables, through `iptables-legacy`.
    Legacy,
    /// A machine with one iptables only.
    Plain,
}

impl Variant {
    /// Finds the variant that this machine's rules are in, as the distributions' wrappers do
    /// (kubernetes-sigs/iptables-wrappers): the one with the kubelet's chains, else the one with more rules, else
    /// nf_tables.
    pub fn detect() -> Result<Self, DatapathError> {
        if !works("iptables-nft") || !works("iptables-legacy") {
            return match works("iptables") {
                true => Ok(Self::Plain),
                false => Err(missing()),
            };
        }
        let saved = |variant: Self, table| -> String {
            let programs = [Family::V4, Family::V6].map(|family| Programs { variant, family });
            programs.iter().filter_map(|programs| programs.save(table).ok()).collect()
        };
        let of_kubelet = |text: &str| {
            text.lines().any(|line| {
                line.starts_with(":KUBE-IPTABLES-HINT ") || line.starts_with(":KUBE-KUBELET-CANARY ")
            })
        };
        let candidates = [Self::Nft, Self::Legacy];
        if let Some(variant) = candidates.into_iter().find(|v| of_kubelet(&saved(*v, Some(Table::Mangle)))) {
            return Ok(variant);
        }
        let rules = |variant| saved(variant, None).lines().filter(|line| line.starts_with('-')).count();
        Ok(if rules(Self::Legacy) > rules(Self::Nft) { Self::Legacy } else { Self::Nft })
    }
}

fn works(program: &str) -> bool {
    let status = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}

fn missing() -> DatapathError {
    let help = "no working iptables in $PATH: install the package iptables, or run with --mode ebpf";
    DatapathError::Kernel { operation: "find", object: "iptables".into(), source: help.into() }
}

/// The programs of one family.
#[derive(Clone, Copy, Debug)]
pub struct Programs {
    /// Which interface.
    pub variant: Variant,
    /// IPv4: `iptables`, IPv6: `ip6tables`.
    pub family: Family,
}

impl Programs {
    /// Their name without `-save` or `-restore`.
    pub fn name(&self) -> String {
        let program = match self.family {
            Family::V4 => "iptables",
            Family::V6 => "ip6tables",
        };
        match self.variant {
            Variant::Nft => format!("{program}-nft"),
            Variant::Legacy => format!("{program}-legacy"),
            Variant::Plain => program.to_owned(),
        }
    }

    /// `MASQUERADE --random-fully` is known from iptables 1.6.2 on.
    pub fn knows_random_fully(&self) -> bool {
        let text = self.version();
        let number = text.split('v').nth(1).unwrap_or_default();
        let mut parts =
            number.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse::<u32>().unwrap_or(0));
        let version = [parts.next(), parts.next(), parts.next()].map(Option::unwrap_or_default);
        version >= [1, 6, 2]
    }

    /// They write to nf_tables.
    pub fn are_nft(&self) -> bool {
        self.variant == Variant::Nft || self.version().contains("(nf_tables)")
    }

    /// What the program says it is; nothing if it can't be run.
    fn version(&self) -> String {
        let output = Command::new(self.name()).arg("--version").output();
        output.map(|output| program::printed(&output)).unwrap_or_default()
    }

    /// What is loaded, as text.
    pub fn save(&self, table: Option<Table>) -> Result<String, DatapathError> {
        let name = format!("{}-save", self.name());
        let args = table.map(|table| ["-t", table.name()]);
        let output = program::feed(&name, args.as_slice().as_flattened(), "")?;
        match output.status.success() {
            true => Ok(program::printed(&output)),
            false => Err(program::failed(&name, &[], program::complaint(&output))),
        }
    }

    /// The rules of a chain as text, empty if there is no such chain; `None` if the program can't tell.
    pub fn list(&self, table: Table, chain: &str) -> Option<String> {
        let args = ["-w", "5", "-t", table.name(), "-S", chain];
        let output = Command::new(self.name()).args(args).output().ok()?;
        // iptables(8): 1 is "no chain by that name" here; other codes are about the command or its resources.
        match output.status.code() {
            Some(0) => Some(String::from_utf8_lossy(&output.stdout).into_owned()),
            Some(1) => Some(String::new()),
            _ => None,
        }
    }

    /// Loads text; all of a table or nothing of it. Waits up to 5 s for other writers (xtables lock).
    pub fn restore(&self, text: &str) -> Result<(), DatapathError> {
        let name = format!("{}-restore", self.name());
        let output = program::feed(&name, &["--noflush", "--wait", "5"], text)?;
        match output.status.success() {
            true => Ok(()),
            false => Err(program::failed(&name, &[], explain(&program::complaint(&output), text))),
        }
    }
}

/// What iptables-restore complained of, with the line it names.
fn explain(said: &str, text: &str) -> String {
    match named_line(said).and_then(|number| text.lines().nth(number.checked_sub(1)?)) {
        Some(line) => format!("{said} ({line})"),
        None => said.to_owned(),
    }
}

/// The number after the last "line": `line 7 failed`, `Error occurred at line: 7`. The program's version is a number, too.
fn named_line(said: &str) -> Option<usize> {
    let (_, rest) = said.rsplit_once("line")?;
    rest.trim_start_matches([':', ' ']).split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// What is loaded of the chains kube-proxy and we write.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Loaded {
    /// Our chains.
    pub chains: BTreeSet<Chain>,
    /// Rules in the kernel's own chains that lead to ours: table, calling chain, called chain, line.
    pub jumps: Vec<(Table, String, String, String)>,
    /// Tables in which a kubelet has made its canary.
    pub kubelet: BTreeSet<Table>,
}

impl Loaded {
    /// Reads the output of `iptables-save`.
    pub fn parse(text: &str) -> Self {
        let mut loaded = Self::default();
        let mut table = None;
        for line in text.lines() {
            if let Some(name) = line.strip_prefix('*') {
                table = Table::ALL.into_iter().find(|table| table.name() == name);
            }
            let Some(table) = table else { continue };
            if let Some(chain) = line.strip_prefix(':').and_then(|rest| rest.split(' ').next()) {
                if chain == names::KUBELET_CANARY {
                    loaded.kubelet.insert(table);
                } else if is_ours(chain) {
                    loaded.chains.insert((table, Arc::from(chain)));
                }
            }
            let from = line.strip_prefix("-A ").and_then(|rest| rest.split(' ').next());
            let to = line.split(" -j ").nth(1).and_then(|rest| rest.split(' ').next());
            if let (Some(from), Some(to)) = (from, to)
                && is_ours(to)
                && !is_ours(from)
            {
                loaded.jumps.push((table, from.to_owned(), to.to_owned(), line.to_owned()));
            }
        }
        loaded
    }

    /// A kubelet may have made this chain, which is here.
    pub fn is_of_kubelet(&self, table: Table, chain: &str) -> bool {
        self.kubelet.contains(&table) && names::SHARED_WITH_KUBELET.contains(&chain)
    }

    /// Our agent wrote these, not kube-proxy.
    pub fn is_owned(&self) -> bool {
        self.chains.contains(&(Table::Mangle, Arc::from(names::OWNER)))
    }
}

/// kube-proxy and we write this chain.
pub fn is_ours(chain: &str) -> bool {
    names::SHARED.contains(&chain) || names::OF_SERVICES.iter().any(|prefix| chain.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_complaint_comes_with_the_line_it_names() {
        let text = "*nat\n-A X -j NOWHERE\nCOMMIT\n";
        for said in [
            "iptables-restore v1.8.9 (nf_tables): Chain 'NOWHERE' does not exist\nError occurred at line: 2\nTry `iptables-restore -h'",
            "iptables-restore v1.8.9 (nf_tables): \nline 2: RULE_APPEND failed (No such file or directory): rule in chain X",
            "iptables-restore: line 2 failed",
        ] {
            assert_eq!(explain(said, text), format!("{said} (-A X -j NOWHERE)"));
        }
        for said in ["iptables v1.8.9: can't initialize table", "line 0", "line 9", "a line too long"] {
            assert_eq!(explain(said, text), said);
        }
    }

    #[test]
    fn our_chains_and_the_ways_to_them_are_found_among_others() {
        let text = "*filter\n:INPUT ACCEPT [1:60]\n:KUBE-SERVICES - [0:0]\n:KUBE-KUBELET-CANARY - [0:0]\n:CALICO - [0:0]\n\
                    -A INPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
                    -A INPUT -j CALICO\nCOMMIT\n*raw\n:KUBE-SVC-X - [0:0]\nCOMMIT\n*nat\n:KUBE-SEP-I77PXRDZVX7PMWMN - [0:0]\nCOMMIT\n";
        let loaded = Loaded::parse(text);
        let chains: Vec<String> = loaded.chains.iter().map(|(t, c)| format!("{}/{c}", t.name())).collect();
        assert_eq!(chains, ["filter/KUBE-SERVICES", "nat/KUBE-SEP-I77PXRDZVX7PMWMN"]);
        assert_eq!(loaded.kubelet, BTreeSet::from([Table::Filter]));
        assert_eq!(loaded.jumps.len(), 1);
        assert_eq!((&*loaded.jumps[0].1, &*loaded.jumps[0].2), ("INPUT", "KUBE-SERVICES"));
        assert!(!loaded.is_owned());
    }
}
