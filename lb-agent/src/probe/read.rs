//! Tries what this machine can. Whatever is made for that is gone afterwards; only modules that the kernel loads of its
//! own accord, for rules or programs that are tried, stay.

use std::{
    collections::BTreeMap,
    ffi::CString,
    fs,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use aya::programs::{SchedClassifier, TcAttachType, tc};
use lb_core::{
    compile::{CompileConfig, Compiler, NodeView},
    model::{Event, Family, TrafficPolicy},
    rules::{incremental, iptables::Config, nftables},
    synthetic,
    table::ServiceTable,
};

use super::{Facts, Finding, Found, What};
use crate::{
    datapath::{
        ebpf::{
            attach::SOCK_HOOKS,
            load::Programs as BpfPrograms,
            objects,
            sys::{self, attach_type},
        },
        iptables::exec::{Programs, Variant},
        nftables::nft as run_nft,
    },
    scratch::Scratch,
};

impl Facts {
    /// Looks at everything.
    pub fn read(bpf_root: &Path, cgroup_root: &Result<PathBuf, String>) -> Self {
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let release = release.trim();
        let [bpf_privileges, net_privileges] = privileges();
        let scratch = Scratch::new().map_err(|error| format!("no network namespace to try it in: {error}"));
        let mut findings = BTreeMap::from([
            (What::Kernel, Finding::yes(release)),
            (What::Bpffs, bpffs(bpf_root)),
            (What::Btf, btf()),
            (What::Nft, nft_program()),
            (What::Ipvsadm, in_path("ipvsadm")),
            (What::IpVs, module("ip_vs", Path::new("/proc/net/ip_vs"))),
            (What::Dummy, module("dummy", Path::new("/sys/module/dummy"))),
            (
                What::Cgroup2,
                match cgroup_root {
                    Ok(root) => Finding::yes(root.display().to_string()),
                    Err(reason) => Finding::no(reason.clone()),
                },
            ),
        ]);
        if bpf_privileges.found == Found::Yes {
            findings.extend(bpf(&scratch, cgroup_root));
        } else {
            for what in [What::Programs, What::Tc, What::Xdp, What::SocketHooks] {
                findings.insert(what, Finding::unknown(UNPRIVILEGED));
            }
        }
        if net_privileges.found == Found::Yes {
            let nft = findings[&What::Nft].found;
            findings.extend([nftables(&scratch, nft)]);
            findings.extend(iptables(&scratch));
            findings.insert(What::Ipset, program("ipset", &["--version"]));
        } else {
            // ipset asks the kernel for its version, too.
            for what in [What::NftablesRules, What::IptablesRules, What::Ip6tablesRules, What::Ipset] {
                findings.insert(what, Finding::unknown(UNPRIVILEGED));
            }
            findings.insert(What::Iptables, program("iptables", &["--version"]));
        }
        findings.insert(What::BpfPrivileges, bpf_privileges);
        findings.insert(What::NetPrivileges, net_privileges);
        Self { kernel: version(release), findings }
    }
}

/// Major and minor number at the start of a release.
fn version(release: &str) -> (u32, u32) {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

const UNPRIVILEGED: &str = "can't be tried without privileges";

/// `include/uapi/linux/capability.h`.
const NET_ADMIN: u32 = 12;
const SYS_ADMIN: u32 = 21;
const PERFMON: u32 = 38;
const BPF: u32 = 39;

/// For BPF, and for rules.
fn privileges() -> [Finding; 2] {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let Some(effective) = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()) else {
        let unknown = Finding::unknown("/proc/self/status doesn't tell capabilities");
        return [unknown.clone(), unknown];
    };
    let has = |bit: u32| effective >> bit & 1 == 1;
    let need = |needed: &[(&str, bool)]| {
        let names =
            |held| needed.iter().filter(|(_, has)| *has == held).map(|(name, _)| *name).collect::<Vec<_>>();
        match names(false) {
            lacks if lacks.is_empty() => Finding::yes(names(true).join(", ")),
            lacks => Finding::no(format!("no {}", lacks.join(", "))),
        }
    };
    // CAP_SYS_ADMIN has been all of BPF before that was split off, and still counts (capabilities(7)).
    let net = ("CAP_NET_ADMIN", has(NET_ADMIN));
    let bpf = [("CAP_BPF", has(BPF) || has(SYS_ADMIN)), ("CAP_PERFMON", has(PERFMON) || has(SYS_ADMIN)), net];
    [need(&bpf), need(&[net])]
}

/// The pins' root, or the folder it will be made in, lies on bpffs.
fn bpffs(root: &Path) -> Finding {
    let Some(there) = root.ancestors().find(|path| path.is_dir()) else {
        return Finding::no(format!("no folder {}", root.display()));
    };
    let mut stat = std::mem::MaybeUninit::<libc::statfs>::zeroed();
    let Ok(path) = CString::new(there.as_os_str().as_bytes()) else {
        return Finding::no(format!("{} is no path", there.display()));
    };
    // SAFETY: path ends with a zero, stat is large enough.
    if unsafe { libc::statfs(path.as_ptr(), stat.as_mut_ptr()) } != 0 {
        return Finding::unknown(format!("{}: {}", there.display(), std::io::Error::last_os_error()));
    }
    // SAFETY: all zero is a valid statfs, and the kernel has filled it in.
    let kind = unsafe { stat.assume_init() }.f_type;
    match kind {
        libc::BPF_FS_MAGIC => Finding::yes(there.display().to_string()),
        _ => Finding::no(format!("{} is not on bpffs", root.display())),
    }
}

fn btf() -> Finding {
    let path = Path::new("/sys/kernel/btf/vmlinux");
    match path.exists() {
        true => Finding::yes(path.display().to_string()),
        false => Finding::no(format!("no {}", path.display())),
    }
}

/// Built in or loaded, or there to be loaded; `trace` is there once it is.
fn module(name: &str, trace: &Path) -> Finding {
    if trace.exists() || Path::new("/sys/module").join(name).exists() {
        return Finding::yes("there");
    }
    // -n: looks for it and loads nothing.
    let found = Command::new("modprobe")
        .args(["-n", "-q", name])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    match found {
        Ok(status) if status.success() => Finding::yes(format!("module {name} is available, not loaded")),
        Ok(_) => Finding::no(format!("no module {name}")),
        Err(error) => Finding::unknown(format!("{name} is not loaded, and modprobe doesn't run: {error}")),
    }
}

/// A program that says its version.
fn program(name: &str, args: &[&str]) -> Finding {
    match Command::new(name).args(args).stderr(Stdio::null()).output() {
        Ok(output) if output.status.success() => {
            Finding::yes(String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().trim())
        }
        Ok(output) => Finding::no(format!("{name} doesn't work ({})", output.status)),
        Err(_) => Finding::no(format!("no {name} in $PATH")),
    }
}

/// A program that can't be asked for its version without changing something: ipvsadm would load a module.
fn in_path(name: &str) -> Finding {
    let dirs = std::env::var_os("PATH").unwrap_or_default();
    match std::env::split_paths(&dirs).map(|dir| dir.join(name)).find(|path| path.is_file()) {
        Some(path) => Finding::yes(path.display().to_string()),
        None => Finding::no(format!("no {name} in $PATH")),
    }
}

/// nft with the syntax that our tables need.
fn nft_program() -> Finding {
    let finding = program("nft", &["--version"]);
    let number = finding.detail.split(" v").nth(1).unwrap_or_default();
    let patch = number.split('.').nth(2).map_or("0", |rest| rest.split(' ').next().unwrap_or("0"));
    let (major, minor) = version(number);
    if finding.found == Found::Yes && (major, minor, patch.parse().unwrap_or(0)) < (1, 0, 1) {
        return Finding::no(format!("{} is too old", finding.detail));
    }
    finding
}

/// A place for trials, or why there is none.
type Place = Result<Scratch, String>;

/// Our programs, and the hooks they hang on.
fn bpf(scratch: &Place, cgroup_root: &Result<PathBuf, String>) -> Vec<(What, Finding)> {
    let mut programs = match BpfPrograms::trial(&objects::NORMAL) {
        Ok(programs) => programs,
        Err(error) => {
            let unknown = || Finding::unknown("can't be tried without our programs");
            return vec![
                (What::Programs, Finding::no(format!("our programs don't load: {}", causes(&error)))),
                (What::Tc, unknown()),
                (What::Xdp, unknown()),
                (What::SocketHooks, unknown()),
            ];
        }
    };
    let hooked = match scratch {
        Ok(scratch) => {
            scratch.within(|| (tc(&mut programs), xdp(&programs))).map_err(|error| error.to_string())
        }
        Err(reason) => Err(reason.clone()),
    };
    let (tc, xdp) = hooked.unwrap_or_else(|reason| (tcx_by_query(&reason), Finding::unknown(reason)));
    vec![
        (What::Programs, Finding::yes("ours load")),
        (What::Tc, tc),
        (What::Xdp, xdp),
        (What::SocketHooks, socket_hooks(&programs, cgroup_root)),
    ]
}

/// A kernel that answers what hangs on a device's TCX hooks has them.
fn tcx_by_query(untried: &str) -> Finding {
    match SchedClassifier::query_tcx("lo", TcAttachType::Ingress) {
        Ok(_) => Finding::yes("TCX, says the kernel"),
        Err(_) => Finding::unknown(untried),
    }
}

/// An error with its causes, in one line of bearable length: the verifier's log is long.
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(300) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}

/// Every namespace's loopback device has this number (`net/core/net_namespace.c`, `LOOPBACK_IFINDEX`).
const LOOPBACK: u32 = 1;

fn tc(programs: &mut BpfPrograms) -> Finding {
    let tcx = programs.fd("lb_pod_in").map_err(|error| error.to_string()).and_then(|program| {
        sys::link_create(program, LOOPBACK, attach_type::TCX_INGRESS, 0).map_err(|error| error.to_string())
    });
    let Err(no_tcx) = tcx else { return Finding::yes("TCX") };
    let mut clsact = || -> anyhow::Result<()> {
        tc::qdisc_add_clsact("lo")?;
        let program = programs.tc().program_mut("lb_pod_in");
        let program: &mut SchedClassifier =
            program.ok_or_else(|| anyhow::anyhow!("no program lb_pod_in"))?.try_into()?;
        let options = tc::TcAttachOptions::Netlink(tc::NlOptions::default());
        program.attach_with_options("lo", TcAttachType::Ingress, options)?;
        Ok(())
    };
    match clsact() {
        Ok(()) => Finding::yes(format!("clsact (no TCX: {no_tcx})")),
        Err(error) => {
            Finding::no(format!("programs can't be attached by tc (TCX: {no_tcx}; clsact: {error:#})"))
        }
    }
}

/// `XDP_FLAGS_SKB_MODE` (`include/uapi/linux/if_link.h`): a loopback device has no driver that runs programs.
const XDP_GENERIC: u32 = 1 << 1;

fn xdp(programs: &BpfPrograms) -> Finding {
    let attached = programs.fd("lb_xdp").map_err(|error| error.to_string()).and_then(|program| {
        sys::link_create(program, LOOPBACK, attach_type::XDP, XDP_GENERIC).map_err(|error| error.to_string())
    });
    match attached {
        Ok(_) => Finding::yes("in the stack; in the driver where a device's driver can"),
        Err(error) => Finding::no(format!("no XDP links: {error}")),
    }
}

/// Attaches to an empty cgroup below the one that would be served.
fn socket_hooks(programs: &BpfPrograms, cgroup_root: &Result<PathBuf, String>) -> Finding {
    let root = match cgroup_root {
        Ok(root) => root,
        Err(reason) => return Finding::no(reason.clone()),
    };
    let dir = root.join(format!("lb-agent-probe-{}", std::process::id()));
    if let Err(error) = fs::create_dir(&dir) {
        return Finding::unknown(format!(
            "no cgroup to try them on can be made in {}: {error}",
            root.display()
        ));
    }
    let attached = || -> Result<Vec<OwnedFd>, String> {
        let cgroup = fs::File::open(&dir).map_err(|error| error.to_string())?;
        let attach = |(hook, program, kind): &(&str, &'static str, u32)| {
            let program = programs.fd(program).map_err(|error| error.to_string())?;
            sys::link_create(program, cgroup.as_raw_fd() as u32, *kind, 0)
                .map_err(|error| format!("{hook}: {error}"))
        };
        SOCK_HOOKS.iter().map(attach).collect()
    };
    let finding = match attached() {
        Ok(links) => Finding::yes(format!("{} kinds", links.len())),
        Err(error) => {
            Finding::no(format!("programs can't be attached to sockets of {}: {error}", root.display()))
        }
    };
    match fs::remove_dir(&dir) {
        Ok(()) => finding,
        Err(error) => {
            Finding { detail: format!("{}; {} stays: {error}", finding.detail, dir.display()), ..finding }
        }
    }
}

fn trial(scratch: &Place, what: &str, work: impl FnOnce() -> Result<(), String> + Send) -> Finding {
    let done = match scratch {
        Ok(scratch) => {
            scratch.within(work).map_err(|error| format!("the network namespace for trials: {error}"))
        }
        Err(reason) => Err(reason.clone()),
    };
    match done {
        Ok(Ok(())) => Finding::yes("ours load"),
        Ok(Err(error)) => Finding::no(format!("{what} don't load: {error}")),
        Err(reason) => Finding::unknown(reason),
    }
}

/// Our tables, of a small cluster.
fn nftables(scratch: &Place, nft: Found) -> (What, Finding) {
    let table = sample();
    let finding = match nft {
        Found::Yes => trial(scratch, "nftables tables", || {
            for family in [Family::V4, Family::V6] {
                let rules = nftables::Rules::all(&table, family, &Config::default());
                run_nft(&["-f", "-"], &rules.to_string()).map_err(|error| causes(&error))?;
            }
            Ok(())
        }),
        _ => Finding::unknown("can't be tried without nft"),
    };
    (What::NftablesRules, finding)
}

/// The programs that this machine's rules are in, and our rules of a small cluster in both families.
fn iptables(scratch: &Place) -> Vec<(What, Finding)> {
    let variant = match Variant::detect() {
        Ok(variant) => variant,
        Err(error) => {
            let unknown = || Finding::unknown("can't be tried without iptables");
            return vec![
                (What::Iptables, Finding::no(causes(&error))),
                (What::IptablesRules, unknown()),
                (What::Ip6tablesRules, unknown()),
            ];
        }
    };
    let table = sample();
    let name = Programs { variant, family: Family::V4 }.name();
    let version = program(&name, &["--version"]).detail;
    let mut found = vec![(What::Iptables, Finding::yes(format!("{name} ({version})")))];
    for (what, family) in [(What::IptablesRules, Family::V4), (What::Ip6tablesRules, Family::V6)] {
        let programs = Programs { variant, family };
        let rules = incremental::Rules::all(&table, family, &Config::default()).to_string();
        let restore = || programs.restore(&rules).map_err(|error| causes(&error));
        found.push((what, trial(scratch, &format!("{family} rules"), restore)));
    }
    found
}

/// A table that needs every kind of rule: affinity, policy Local, a port on the node.
fn sample() -> ServiceTable {
    let own = "192.0.2.1".parse().ok();
    let view = NodeView {
        name: "node-1".into(),
        addresses: own.into_iter().collect(),
        zone: None,
        ..NodeView::default()
    };
    let mut compiler = Compiler::new(CompileConfig::default(), view);
    let mut service = synthetic::service(0);
    service.affinity_secs = Some(10);
    service.external_policy = TrafficPolicy::Local;
    service.ports[0].node_port = 30_000;
    compiler.apply(Event::Service(service));
    compiler.apply(Event::EndpointSlice(synthetic::slice(0, 3, 0)));
    compiler.compile();
    compiler.table().clone()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_read_as_distributions_write_them() {
        for (release, expected) in
            [("6.18.44-fc", (6, 18)), ("4.19.0-27-amd64", (4, 19)), ("5.14", (5, 14)), ("", (0, 0))]
        {
            assert_eq!(version(release), expected, "{release}");
        }
    }

    #[test]
    fn the_sample_asks_for_every_kind_of_rule() {
        let table = sample();
        let iptables = incremental::Rules::all(&table, Family::V4, &Config::default()).to_string();
        for part in ["-m recent", "-m statistic", "MASQUERADE", "DNAT", "addrtype"] {
            assert!(iptables.contains(part), "no {part} in\n{iptables}");
        }
        let nft = nftables::Rules::all(&table, Family::V4, &Config::default()).to_string();
        for part in ["numgen", "fib saddr", "dynamic,timeout", "reject", "masquerade"] {
            assert!(nft.contains(part), "no {part} in\n{nft}");
        }
    }
}
