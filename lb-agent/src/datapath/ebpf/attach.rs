//! Attaches programs to devices and to the cgroup tree, by links that are pinned and so outlive the agent.
//!
//! A link that an earlier agent pinned gets the new program in one step: there is no moment without one.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
};

use aya::programs::{
    SchedClassifier, TcAttachType,
    links::Link as _,
    tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle},
};
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use super::{
    load::Programs,
    maps::Pins,
    sys::{self, attach_type},
};
use crate::{
    datapath::DatapathError,
    netlink::{Device, DeviceClass},
};

/// How XDP is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum XdpMode {
    /// In the driver, else not at all: tc alone is faster than generic XDP and sees every packet whole.
    Auto,
    /// In the driver or not at all.
    Native,
    /// In the stack, before tc.
    Generic,
    /// Not at all: tc does everything.
    Off,
}

/// How tc programs are attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum TcMode {
    /// TCX, else a filter on a clsact qdisc.
    Auto,
    /// TCX or not at all.
    Tcx,
    /// A filter on a clsact qdisc.
    Clsact,
}

/// How programs are attached to devices.
#[derive(Clone, Copy, Debug)]
pub struct Modes {
    /// XDP programs.
    pub xdp: XdpMode,
    /// tc programs.
    pub tc: TcMode,
}

/// One hook, for `status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// Device name, or the cgroup path.
    pub target: String,
    /// Which hook.
    pub hook: String,
    /// `tcx`, `clsact`, `native`, `generic`, `link`, or `-` for nothing.
    pub mode: String,
    /// Why not something better.
    pub reason: String,
}

/// Socket hooks: name, program, kind.
pub const SOCK_HOOKS: [(&str, &str, u32); 8] = [
    ("connect4", "lb_connect4", attach_type::CGROUP_INET4_CONNECT),
    ("connect6", "lb_connect6", attach_type::CGROUP_INET6_CONNECT),
    ("sendmsg4", "lb_sendmsg4", attach_type::CGROUP_UDP4_SENDMSG),
    ("sendmsg6", "lb_sendmsg6", attach_type::CGROUP_UDP6_SENDMSG),
    ("recvmsg4", "lb_recvmsg4", attach_type::CGROUP_UDP4_RECVMSG),
    ("recvmsg6", "lb_recvmsg6", attach_type::CGROUP_UDP6_RECVMSG),
    ("getpeername4", "lb_getpeername4", attach_type::CGROUP_INET4_GETPEERNAME),
    ("getpeername6", "lb_getpeername6", attach_type::CGROUP_INET6_GETPEERNAME),
];

/// `XDP_FLAGS_SKB_MODE`, `XDP_FLAGS_DRV_MODE` (`include/uapi/linux/if_link.h`).
const XDP_GENERIC: u32 = 1 << 1;
const XDP_NATIVE: u32 = 1 << 2;

/// Preference of our filters on a clsact qdisc, and their handles: a new program takes the one that is free, then the
/// old program's is removed.
const CLSACT_PRIORITY: u16 = 50;
const CLSACT_HANDLES: [TcHandle; 2] = [TcHandle::new(0, 0x6c62), TcHandle::new(0, 0x6c63)];

/// Keeps programs attached to what should have them.
pub struct Attacher {
    pins: Pins,
    programs: Programs,
    modes: Modes,
    cgroup: Option<PathBuf>,
    devices: Vec<Device>,
    attached: BTreeMap<String, Attached>,
    /// Names of those that run the present programs.
    current: BTreeSet<String>,
    /// Devices whose XDP program runs in the driver: frames may be sent there.
    native: BTreeSet<u32>,
}

impl Attacher {
    /// Nothing is attached yet, but for what an earlier agent left.
    pub fn new(pins: Pins, programs: Programs, modes: Modes) -> Self {
        Self {
            pins,
            programs,
            modes,
            cgroup: None,
            devices: Vec::new(),
            attached: BTreeMap::new(),
            current: BTreeSet::new(),
            native: BTreeSet::new(),
        }
    }

    /// Devices that frames may be sent to from XDP.
    pub fn xdp_targets(&self) -> &BTreeSet<u32> {
        &self.native
    }

    /// Puts other programs in the place of the present ones, hook by hook: none is without a program. If one of them can't
    /// be exchanged, all get the present ones back.
    pub fn replace(&mut self, programs: Programs) -> Result<(), DatapathError> {
        let before = std::mem::replace(&mut self.programs, programs);
        let had = self.attached.clone();
        let result = self.attach_everywhere().and_then(|()| {
            let is_lost = |name: &String| self.attached.get(name).is_none_or(|now| now.mode == "-");
            match had.iter().find(|(name, hook)| hook.mode != "-" && is_lost(name)) {
                None => Ok(()),
                Some((name, hook)) => Err(DatapathError::Kernel {
                    operation: "exchange the program at",
                    object: format!("{} {}", hook.target, hook.hook),
                    source: self.attached.get(name).map(|now| now.reason.clone()).unwrap_or_default().into(),
                }),
            }
        });
        if result.is_err() {
            self.programs = before;
            self.attach_everywhere()?;
        }
        result
    }

    fn attach_everywhere(&mut self) -> Result<(), DatapathError> {
        self.current.clear();
        if let Some(root) = self.cgroup.clone() {
            self.attach_cgroup(&root)?;
        }
        let devices = std::mem::take(&mut self.devices);
        self.sync(&devices);
        Ok(())
    }

    /// Attaches the socket programs to a cgroup and all below it.
    pub fn attach_cgroup(&mut self, root: &Path) -> Result<(), DatapathError> {
        self.cgroup = Some(root.to_owned());
        let failed = |source: io::Error| DatapathError::Kernel {
            operation: "attach socket programs to cgroup",
            object: format!("{} (must be a directory of cgroup v2)", root.display()),
            source: source.into(),
        };
        let dir = File::open(root).map_err(failed)?;
        let id = dir.metadata().map_err(failed)?.ino();
        for (name, program, kind) in SOCK_HOOKS {
            let pin = self.pins.links().join(format!("cgroup-{name}"));
            let program = self.programs.fd(program)?;
            let same_target = |link: &std::os::fd::OwnedFd| cgroup_of(link).is_ok_and(|known| known == id);
            replace_or_create(&pin, program, same_target, || {
                sys::link_create(program, dir.as_raw_fd() as u32, kind, 0)
            })
            .map_err(failed)?;
            self.note(
                format!("cgroup-{name}"),
                &root.display().to_string(),
                &format!("cgroup {name}"),
                "link",
                "",
            );
        }
        Ok(())
    }

    /// Attaches to the devices that should have programs, and takes them off all others.
    pub fn sync(&mut self, devices: &[Device]) {
        let mut wanted: BTreeSet<String> =
            SOCK_HOOKS.iter().map(|(name, ..)| format!("cgroup-{name}")).collect();
        for device in devices {
            let hooks: [(&str, &'static str, u32); 2] = match device.class {
                DeviceClass::External => [
                    ("in", "lb_netdev_in", attach_type::TCX_INGRESS),
                    ("out", "lb_netdev_out", attach_type::TCX_EGRESS),
                ],
                DeviceClass::Pod => [
                    ("in", "lb_pod_in", attach_type::TCX_INGRESS),
                    ("out", "lb_pod_out", attach_type::TCX_EGRESS),
                ],
                DeviceClass::Other => continue,
            };
            for (side, program, kind) in hooks {
                let name = format!("tcx-{side}-{}", device.ifindex);
                wanted.insert(name.clone());
                self.attach_tc(&name, device, program, kind);
            }
            if device.class == DeviceClass::External {
                let name = format!("xdp-{}", device.ifindex);
                wanted.insert(name.clone());
                self.attach_xdp(&name, device);
            }
        }
        self.native.retain(|ifindex| devices.iter().any(|device| device.ifindex == *ifindex));
        self.attached.retain(|name, _| wanted.contains(name));
        self.current.retain(|name| wanted.contains(name));
        self.devices = devices.to_vec();
        for pin in pinned_links(&self.pins) {
            let name = pin.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if !wanted.contains(&name) {
                remove_link(&pin);
            }
        }
        save_status(&self.pins, self.attached.values());
    }

    fn attach_tc(&mut self, name: &str, device: &Device, program: &'static str, kind: u32) {
        if self.current.contains(name) {
            return;
        }
        let hook = format!("tc {}", if kind == attach_type::TCX_INGRESS { "ingress" } else { "egress" });
        let mut reason = String::new();
        if self.modes.tc != TcMode::Clsact {
            match self.attach_tcx(name, device, program, kind) {
                Ok(()) => {
                    let _ = tc::qdisc_detach_program(&device.name, side(kind), program);
                    return self.note(name.into(), &device.name, &hook, "tcx", "");
                }
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                    reason = format!("no TCX ({error}): kernel 6.6 has it");
                }
                Err(error) => reason = error.to_string(),
            }
        } else {
            reason.push_str("--tc-mode clsact");
        }
        if self.modes.tc == TcMode::Tcx {
            return self.note(name.into(), &device.name, &hook, "-", &reason);
        }
        match self.attach_clsact(device, program, side(kind)) {
            Ok(()) => {
                remove_link(&self.pins.links().join(name));
                self.note(name.into(), &device.name, &hook, "clsact", &reason);
            }
            Err(error) => {
                let reason = format!("{reason}; clsact: {error:#}");
                self.note(name.into(), &device.name, &hook, "-", &reason);
            }
        }
    }

    fn attach_tcx(&self, name: &str, device: &Device, program: &'static str, kind: u32) -> io::Result<()> {
        let fd = self.programs.fd(program).map_err(|error| io::Error::other(error.to_string()))?;
        let same_target = |link: &std::os::fd::OwnedFd| on_device(link, device.ifindex);
        replace_or_create(&self.pins.links().join(name), fd, same_target, || {
            sys::link_create(fd, device.ifindex, kind, 0)
        })
    }

    /// A filter on a clsact qdisc. It isn't pinned: it lives with the device.
    fn attach_clsact(&mut self, device: &Device, program: &str, side: TcAttachType) -> anyhow::Result<()> {
        // Fails if it is there already; then it serves as well.
        let _ = tc::qdisc_add_clsact(&device.name);
        let ebpf = self.programs.tc();
        let loaded: &mut SchedClassifier =
            ebpf.program_mut(program).ok_or_else(|| anyhow::anyhow!("no program {program}"))?.try_into()?;
        let mut failed = None;
        for (n, handle) in CLSACT_HANDLES.into_iter().enumerate() {
            let options = NlOptions { priority: CLSACT_PRIORITY, handle, ..NlOptions::default() };
            match loaded.attach_with_options(&device.name, side, TcAttachOptions::Netlink(options)) {
                Ok(id) => {
                    // Dropping the link would take the filter off when the agent ends.
                    std::mem::forget(loaded.take_link(id)?);
                    let before = CLSACT_HANDLES[1 - n];
                    let old =
                        SchedClassifierLink::attached(&device.name, side, CLSACT_PRIORITY, before, None)?;
                    // Fails if there was none.
                    let _ = old.detach();
                    return Ok(());
                }
                Err(error) => failed = Some(error),
            }
        }
        Err(failed.map_or_else(|| anyhow::anyhow!("no handle"), anyhow::Error::from))
    }

    /// Takes off what agents of other layout versions left, once our own maps are full. Their flow tables can't be
    /// read: connections that they translated go on only if they need no translation.
    ///
    /// True if there was something: hooks that only one program can have are free now, see [`Attacher::sync`].
    pub fn retire_others(&mut self) -> bool {
        let mine = self.pins.dir();
        let others: Vec<PathBuf> = versions(&self.pins).into_iter().filter(|dir| *dir != mine).collect();
        for dir in &others {
            match remove_version(dir) {
                Ok(()) => info!(dir = %dir.display(), "took over from another layout version"),
                Err(error) => warn!(dir = %dir.display(), %error, "not removed"),
            }
        }
        self.current.retain(|name| self.attached.get(name).is_some_and(|attached| attached.mode != "-"));
        !others.is_empty()
    }

    fn attach_xdp(&mut self, name: &str, device: &Device) {
        if self.current.contains(name) {
            return;
        }
        let pin = self.pins.links().join(name);
        let modes: &[(&str, u32)] = match self.modes.xdp {
            XdpMode::Off => &[],
            XdpMode::Auto if device.is_veth => &[],
            XdpMode::Auto => &[("native", XDP_NATIVE)],
            XdpMode::Native => &[("native", XDP_NATIVE)],
            XdpMode::Generic => &[("generic", XDP_GENERIC)],
        };
        let mut reason = match self.modes.xdp {
            XdpMode::Off => "--xdp-mode off".to_owned(),
            XdpMode::Auto if device.is_veth => {
                "frames from a veth's local peer can carry partial checksums, which XDP cannot see".to_owned()
            }
            _ => String::new(),
        };
        for (mode, flags) in modes {
            let result =
                self.programs.fd("lb_xdp").map_err(|error| io::Error::other(error.to_string())).and_then(
                    |fd| {
                        let same_target = |link: &std::os::fd::OwnedFd| on_device(link, device.ifindex);
                        replace_or_create(&pin, fd, same_target, || {
                            sys::link_create(fd, device.ifindex, attach_type::XDP, *flags)
                        })
                    },
                );
            match result {
                Ok(()) => {
                    if *mode == "native" {
                        self.native.insert(device.ifindex);
                    }
                    self.note(name.into(), &device.name, "xdp", mode, &reason);
                    return;
                }
                Err(error) => {
                    if !reason.is_empty() {
                        reason.push_str("; ");
                    }
                    reason.push_str(&format!("{mode}: {error}"));
                }
            }
        }
        remove_link(&pin);
        self.note(name.into(), &device.name, "xdp", "-", &reason);
    }

    /// Remembers and logs, once, how a hook was attached.
    fn note(&mut self, name: String, target: &str, hook: &str, mode: &str, reason: &str) {
        let attached =
            Attached { target: target.into(), hook: hook.into(), mode: mode.into(), reason: reason.into() };
        self.current.insert(name.clone());
        if self.attached.get(&name) == Some(&attached) {
            return;
        }
        if mode == "-" && hook != "xdp" {
            warn!(target = %target, hook, reason, "not attached");
        } else {
            info!(target = %target, hook, mode, reason, "attached");
        }
        self.attached.insert(name, attached);
    }
}

/// Puts the program into the pinned link if there is one on the right target, else makes and pins a new link.
fn replace_or_create(
    pin: &Path,
    program: std::os::fd::BorrowedFd<'_>,
    same_target: impl Fn(&std::os::fd::OwnedFd) -> bool,
    create: impl Fn() -> io::Result<std::os::fd::OwnedFd>,
) -> io::Result<()> {
    if let Ok(link) = sys::get(pin) {
        if same_target(&link) {
            return sys::link_update(link.as_fd(), program);
        }
        remove_link(pin);
    }
    let link = create()?;
    sys::pin(link.as_fd(), pin)
}

fn on_device(link: &std::os::fd::OwnedFd, ifindex: u32) -> bool {
    sys::link_info(link.as_fd())
        .is_ok_and(|info| info.link_type != sys::LINK_CGROUP && info.ifindex == ifindex)
}

/// The id of the cgroup a link hangs on: its directory's inode (`kernfs_node_id`).
fn cgroup_of(link: &std::os::fd::OwnedFd) -> io::Result<u64> {
    sys::link_info(link.as_fd()).map(|info| info.cgroup_id)
}

fn pinned_links(pins: &Pins) -> Vec<PathBuf> {
    read(&pins.links())
}

/// Names of the pinned links, and whether they still hang on something.
pub fn links(pins: &Pins) -> Vec<(String, bool)> {
    let is_attached = |pin: &Path| {
        let info = sys::get(pin).and_then(|link| sys::link_info(link.as_fd()));
        info.is_ok_and(|info| match info.link_type {
            sys::LINK_CGROUP => info.cgroup_id != 0,
            _ => info.ifindex != 0,
        })
    };
    let name = |pin: &Path| pin.file_name().unwrap_or_default().to_string_lossy().into_owned();
    pinned_links(pins).iter().map(|pin| (name(pin), is_attached(pin))).collect()
}

/// Takes a pinned link off and forgets it.
fn remove_link(pin: &Path) {
    if let Ok(link) = sys::get(pin) {
        let _ = sys::link_detach(link.as_fd());
    }
    let _ = fs::remove_file(pin);
}

/// The side of the stack that a TCX attach type means.
fn side(kind: u32) -> TcAttachType {
    if kind == attach_type::TCX_INGRESS { TcAttachType::Ingress } else { TcAttachType::Egress }
}

fn read(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok).map(|entry| entry.path()).collect()
}

/// The pin directories of all layout versions.
fn versions(pins: &Pins) -> Vec<PathBuf> {
    let is_version = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        name.strip_prefix('v').is_some_and(|digits| digits.parse::<u32>().is_ok())
    };
    read(pins.root()).into_iter().filter(is_version).collect()
}

/// Takes a version's links off and removes its pins: programs and maps go with them.
fn remove_version(dir: &Path) -> Result<(), DatapathError> {
    let links = dir.join("links");
    read(&links).iter().for_each(|link| remove_link(link));
    let _ = fs::remove_dir(&links);
    let failed = |path: &Path, source: io::Error| DatapathError::Kernel {
        operation: "remove",
        object: path.display().to_string(),
        source: source.into(),
    };
    for map in read(dir) {
        fs::remove_file(&map).map_err(|source| failed(&map, source))?;
    }
    fs::remove_dir(dir).map_err(|source| failed(dir, source))
}

/// Removes everything of ours: links, filters, maps, directories, whatever their layout version.
pub fn remove_all(pins: &Pins) -> Result<(), DatapathError> {
    versions(pins).iter().try_for_each(|dir| remove_version(dir))?;
    for device in read(Path::new("/sys/class/net")) {
        let name = device.file_name().unwrap_or_default().to_string_lossy().into_owned();
        for program in ["lb_netdev_in", "lb_pod_in"] {
            let _ = tc::qdisc_detach_program(&name, TcAttachType::Ingress, program);
        }
        for program in ["lb_netdev_out", "lb_pod_out"] {
            let _ = tc::qdisc_detach_program(&name, TcAttachType::Egress, program);
        }
    }
    let _ = fs::remove_dir(pins.root());
    let _ = fs::remove_file(status_file(pins));
    Ok(())
}

/// Where the reasons are kept that links can't tell.
fn status_file(pins: &Pins) -> PathBuf {
    let name = pins.root().display().to_string().trim_start_matches('/').replace('/', "-");
    Path::new("/run/lb").join(format!("{name}.json"))
}

fn save_status<'a>(pins: &Pins, attached: impl Iterator<Item = &'a Attached>) {
    let path = status_file(pins);
    let rows: Vec<&Attached> = attached.collect();
    let saved = fs::create_dir_all("/run/lb")
        .and_then(|()| fs::write(&path, serde_json::to_vec_pretty(&rows).unwrap_or_default()));
    if let Err(error) = saved {
        warn!(path = %path.display(), %error, "status is not saved; `lb-agent status` will not know the reasons");
    }
}

/// What the last agent attached, and why.
pub fn read_status(pins: &Pins) -> Vec<Attached> {
    fs::read(status_file(pins)).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default()
}
