//! From what a machine can to the modes that work on it. Pure.

use std::fmt;

use serde::Serialize;

use super::{Facts, Found, What};
use crate::args::Mode;

/// Whether a mode works, from best to worst.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Works {
    /// It does.
    Yes,
    /// It serves, but not all that it could.
    Partly,
    /// It was not possible to tell.
    Unknown,
    /// It doesn't.
    No,
}

/// What is to be said of a mode.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// Its name.
    pub mode: &'static str,
    /// Whether it works.
    pub works: Works,
    /// What is missing, and what to install, mount or boot to get further.
    pub why: Vec<String>,
    /// As an option of `run`; `None` if who asks may not use it.
    #[serde(skip)]
    pub runs: Option<Mode>,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let works = match self.works {
            Works::Yes => "works",
            Works::Partly => "works in part",
            Works::Unknown => "can't be told",
            Works::No => "doesn't work",
        };
        write!(f, "{} {works}", self.mode)?;
        if self.why.is_empty() { Ok(()) } else { write!(f, " ({})", self.why.join("; ")) }
    }
}

/// What a mode can't do without, and what it can.
struct Needs {
    mode: &'static str,
    runs: Mode,
    kernel: (u32, u32),
    must: &'static [What],
    /// With what is not served else.
    should: &'static [(What, &'static str)],
}

/// In order of preference.
const MODES: [Needs; 4] = [
    Needs {
        mode: "ebpf",
        runs: Mode::Ebpf,
        // That the programs load says more than a number: distributions carry features back.
        kernel: (0, 0),
        must: &[What::BpfPrivileges, What::Bpffs, What::Programs, What::Tc],
        should: &[(What::SocketHooks, "the node's own processes are not served")],
    },
    Needs {
        mode: "nftables",
        runs: Mode::Nftables,
        // kube-proxy 1.36 `pkg/proxy/nftables/proxier.go` `getNFTablesInterface`.
        kernel: (5, 13),
        must: &[What::NetPrivileges, What::Nft, What::NftablesRules],
        should: &[],
    },
    Needs {
        mode: "iptables",
        runs: Mode::Iptables,
        kernel: (0, 0),
        must: &[What::NetPrivileges, What::Iptables, What::IptablesRules],
        should: &[(What::Ip6tablesRules, "IPv6 is not served")],
    },
    Needs {
        mode: "ipvs",
        runs: Mode::Ipvs,
        kernel: (0, 0),
        must: &[
            What::NetPrivileges,
            What::IpVs,
            What::Ipvsadm,
            What::Dummy,
            What::Ipset,
            What::Iptables,
            What::IptablesRules,
        ],
        should: &[(What::Ip6tablesRules, "IPv6 is not served")],
    },
];

/// Judges every mode.
pub fn verdicts(facts: &Facts) -> Vec<Verdict> {
    MODES.iter().map(|needs| needs.judge(facts)).collect()
}

/// The first mode that works, else the first that works in part, else the first of which that can't be told: its start
/// will tell.
pub fn pick(verdicts: &[Verdict]) -> Option<&Verdict> {
    let first = |works| verdicts.iter().find(move |verdict| verdict.works == works && verdict.runs.is_some());
    [Works::Yes, Works::Partly, Works::Unknown].into_iter().find_map(first)
}

impl Needs {
    fn judge(&self, facts: &Facts) -> Verdict {
        let mut why = Vec::new();
        let mut works = Works::Yes;
        let mut may = true;
        if facts.kernel < self.kernel {
            let ((major, minor), (has, has_minor)) = (self.kernel, facts.kernel);
            why.push(format!("kernel {has}.{has_minor}: boot {major}.{minor} or later"));
            works = Works::No;
        }
        for what in self.must {
            match facts.get(*what) {
                (Found::Yes, _) => {}
                // Who asks may not do it; the machine may be able to.
                (Found::No, detail) if matches!(what, What::BpfPrivileges | What::NetPrivileges) => {
                    why.push(format!("{detail}: {}", what.remedy()));
                    (works, may) = (works.max(Works::Unknown), false);
                }
                (Found::No, detail) => {
                    why.push(format!("{detail}: {}", what.remedy()));
                    works = Works::No;
                }
                (Found::Unknown, detail) => {
                    why.push(format!("{}: {detail}", what.subject()));
                    works = works.max(Works::Unknown);
                }
            }
        }
        for (what, without) in self.should {
            let (found, detail) = facts.get(*what);
            match (works, found) {
                (Works::Yes | Works::Partly, Found::No) => {
                    why.push(format!("{without}, {detail}: {}", what.remedy()));
                    works = Works::Partly;
                }
                (Works::Yes | Works::Partly, Found::Unknown) => {
                    why.push(format!("perhaps {without}, {detail}"));
                    works = Works::Partly;
                }
                _ => {}
            }
        }
        Verdict { mode: self.mode, works, why, runs: may.then_some(self.runs) }
    }
}

impl What {
    /// Of a sentence that says what is known of it.
    fn subject(self) -> &'static str {
        match self {
            Self::Kernel => "the kernel",
            Self::BpfPrivileges => "privileges for BPF",
            Self::NetPrivileges => "privileges",
            Self::Bpffs => "bpffs",
            Self::Btf => "BTF",
            Self::Programs => "BPF programs",
            Self::Tc => "tc hooks",
            Self::Xdp => "XDP hooks",
            Self::Cgroup2 => "cgroup v2",
            Self::SocketHooks => "socket hooks",
            Self::Nft => "nft",
            Self::NftablesRules => "nftables tables",
            Self::Iptables => "iptables",
            Self::IptablesRules => "iptables rules",
            Self::Ip6tablesRules => "ip6tables rules",
            Self::IpVs => "ip_vs",
            Self::Ipvsadm => "ipvsadm",
            Self::Ipset => "ipset",
            Self::Dummy => "dummy devices",
        }
    }

    /// What to install, mount or boot when it is missing.
    fn remedy(self) -> &'static str {
        match self {
            Self::Kernel => "boot a later one",
            Self::BpfPrivileges => "run as root, or with CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN",
            Self::NetPrivileges => "run as root, or with CAP_NET_ADMIN",
            Self::Bpffs => "mount -t bpf bpf /sys/fs/bpf, or give another --bpf-root",
            Self::Btf => "boot a kernel with CONFIG_DEBUG_INFO_BTF",
            Self::Programs => "boot kernel 5.18 or later with CONFIG_BPF_SYSCALL, BPF_JIT and DEBUG_INFO_BTF",
            Self::Tc => "boot kernel 6.6 or later, or one with CONFIG_NET_CLS_BPF and NET_SCH_INGRESS",
            Self::Xdp => "boot kernel 5.9 or later, which has XDP links",
            Self::Cgroup2 => "mount -t cgroup2 none DIR, and give it as --cgroup-root",
            Self::SocketHooks => {
                "mount cgroup v2 (mount -t cgroup2 none DIR) on a kernel with CONFIG_CGROUP_BPF, or give --cgroup-root"
            }
            Self::Nft => "install the package nftables, 1.0.1 or later",
            Self::NftablesRules => {
                "boot kernel 5.13 or later with CONFIG_NF_TABLES, NFT_NAT, NFT_MASQ, NFT_FIB_INET, NFT_NUMGEN"
            }
            Self::Iptables => "install the package iptables",
            Self::IptablesRules => "boot a kernel with CONFIG_NFT_COMPAT or IP_NF_NAT, and NETFILTER_XTABLES",
            Self::Ip6tablesRules => "boot a kernel with CONFIG_IP6_NF_IPTABLES and NF_NAT",
            Self::IpVs => "boot a kernel with CONFIG_IP_VS, or install the package that has its modules",
            Self::Ipvsadm => "install the package ipvsadm",
            Self::Ipset => "install the package ipset",
            Self::Dummy => "boot a kernel with CONFIG_DUMMY",
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::probe::Finding;

    const ALL: [What; 19] = [
        What::Kernel,
        What::BpfPrivileges,
        What::NetPrivileges,
        What::Bpffs,
        What::Btf,
        What::Programs,
        What::Tc,
        What::Xdp,
        What::Cgroup2,
        What::SocketHooks,
        What::Nft,
        What::NftablesRules,
        What::Iptables,
        What::IptablesRules,
        What::Ip6tablesRules,
        What::IpVs,
        What::Ipvsadm,
        What::Ipset,
        What::Dummy,
    ];

    /// A machine that lacks some things, and of which some can't be told.
    fn machine(kernel: (u32, u32), lacks: &[What], hides: &[What]) -> Facts {
        let finding = |what: &What| match what {
            _ if lacks.contains(what) => Finding::no(format!("no {what:?}")),
            _ if hides.contains(what) => Finding::unknown("needs root"),
            _ => Finding::yes(""),
        };
        let findings: BTreeMap<What, Finding> = ALL.iter().map(|what| (*what, finding(what))).collect();
        Facts { kernel, findings }
    }

    #[test]
    fn the_first_mode_that_works_is_picked() {
        use What::{
            BpfPrivileges, Bpffs, Cgroup2, Iptables, IptablesRules, NetPrivileges, Nft, NftablesRules,
            Programs, SocketHooks, Tc, Xdp,
        };
        for (name, facts, picked) in [
            ("all there", machine((6, 18), &[], &[]), Some("ebpf")),
            ("no XDP", machine((6, 18), &[Xdp], &[]), Some("ebpf")),
            ("no bpffs", machine((6, 18), &[Bpffs], &[]), Some("nftables")),
            ("no cgroup v2", machine((6, 18), &[Cgroup2, SocketHooks], &[]), Some("nftables")),
            (
                "no cgroup v2, nothing else works",
                machine((6, 18), &[Cgroup2, SocketHooks, Nft, Iptables], &[NftablesRules, IptablesRules]),
                Some("ebpf"),
            ),
            ("5.15", machine((5, 15), &[Programs], &[Tc, Xdp, SocketHooks]), Some("nftables")),
            ("5.15, no nft", machine((5, 15), &[Programs, Nft], &[Tc, Xdp, NftablesRules]), Some("iptables")),
            ("5.10, its nf_tables takes our rules", machine((5, 10), &[Programs], &[Tc]), Some("iptables")),
            ("4.19", machine((4, 19), &[Programs, NftablesRules], &[Tc, Xdp]), Some("iptables")),
            (
                "4.19, no iptables",
                machine((4, 19), &[Programs, NftablesRules, Iptables], &[Tc, IptablesRules]),
                None,
            ),
            (
                "not root",
                machine((6, 18), &[BpfPrivileges, NetPrivileges], &[Programs, NftablesRules, IptablesRules]),
                None,
            ),
            (
                "root without a namespace for trials, clsact",
                machine((6, 1), &[], &[Tc, Xdp, NftablesRules, IptablesRules]),
                Some("ebpf"),
            ),
            (
                "root without a namespace for trials, 4.19",
                machine((4, 19), &[Programs], &[Tc, Xdp, NftablesRules, IptablesRules]),
                Some("iptables"),
            ),
            (
                "CAP_NET_ADMIN alone",
                machine((6, 18), &[BpfPrivileges], &[Programs, Tc, IptablesRules]),
                Some("nftables"),
            ),
        ] {
            let verdicts = verdicts(&facts);
            assert_eq!(pick(&verdicts).map(|verdict| verdict.mode), picked, "{name}: {verdicts:#?}");
        }
    }

    #[test]
    fn every_verdict_names_the_way_out() {
        let facts = machine((4, 19), &[What::Programs, What::Nft, What::IpVs], &[What::Tc]);
        let said: Vec<String> = verdicts(&facts).iter().map(ToString::to_string).collect();
        expect_test::expect![[r#"
            ebpf doesn't work (no Programs: boot kernel 5.18 or later with CONFIG_BPF_SYSCALL, BPF_JIT and DEBUG_INFO_BTF; tc hooks: needs root)
            nftables doesn't work (kernel 4.19: boot 5.13 or later; no Nft: install the package nftables, 1.0.1 or later)
            iptables works
            ipvs doesn't work (no IpVs: boot a kernel with CONFIG_IP_VS, or install the package that has its modules)
        "#]]
        .assert_eq(&(said.join("\n") + "\n"));
    }

    #[test]
    fn what_could_not_be_tried_is_neither_works_nor_not() {
        let verdicts = verdicts(&machine((6, 18), &[], &[What::Programs, What::Tc]));
        assert_eq!(verdicts[0].works, Works::Unknown);
        assert_eq!(verdicts[0].why, ["BPF programs: needs root", "tc hooks: needs root"]);
        assert_eq!(pick(&verdicts).map(|verdict| verdict.mode), Some("nftables"));
    }
}
