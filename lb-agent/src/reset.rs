//! `--on-backend-gone reset`: whoever talks to a backend that is gone is told so, instead of waiting for a timeout.
//!
//! Sockets that our hooks connected are ended, in the host's network namespace and in those of all processes below the served
//! cgroup. Connections that the programs translate packet by packet are marked, and their next segment is answered with a
//! reset. What is only on its way out is left alone ([`Backends`]).

use std::{
    collections::{BTreeSet, VecDeque},
    fs::{self, File},
    io,
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use aya::maps::MapData;
use lb_core::{
    model::{Family, Protocol},
    reconcile::{Backends, MOVE},
    table::{Changes, ServiceTable},
};
use tracing::{info, warn};

use crate::{
    datapath::{
        DatapathError,
        ebpf::{
            gone,
            maps::{self, Pins, Wire, map_error, open_connected},
        },
    },
    scratch,
    sock_diag::{self, Connected, SockDiag},
};

/// Who is to be told, and when.
pub struct Resetter {
    pins: Pins,
    /// Below it are the processes whose sockets are served.
    cgroup_root: Option<PathBuf>,
    backends: Backends,
    /// When to look for them.
    looks: VecDeque<Instant>,
    is_first: bool,
}

/// From when a backend is missed until it is looked for; a socket that was just being connected is found at the second look.
const LOOKS: [Duration; 2] = [MOVE, Duration::from_secs(3)];

impl Resetter {
    /// Warns of what can't be done here.
    pub fn new(pins: Pins, cgroup_root: Option<PathBuf>) -> Self {
        if let Err(error) = sock_diag::can_destroy() {
            warn!(
                %error,
                "sockets can't be ended, which needs CONFIG_INET_DIAG_DESTROY and CAP_NET_ADMIN: only forwarded connections to backends that are gone are reset"
            );
        }
        Self { pins, cgroup_root, backends: Backends::default(), looks: VecDeque::new(), is_first: true }
    }

    /// These changes are in the maps.
    pub fn note(&mut self, table: &ServiceTable, changes: &Changes) {
        let now = Instant::now();
        // Before this agent somebody may have gone unnoticed.
        let anybody_missed = self.backends.update(table, changes, now) | std::mem::take(&mut self.is_first);
        if anybody_missed && self.looks.len() < 2 * LOOKS.len() {
            self.looks.extend(LOOKS.map(|after| now + after));
        }
    }

    /// How long until something is to be done; `None` if nothing is.
    pub fn due_in(&self) -> Option<Duration> {
        let next = self.looks.iter().min()?;
        Some(next.saturating_duration_since(Instant::now()))
    }

    /// Tells them, if it is time to.
    pub fn run(&mut self) {
        let now = Instant::now();
        if self.due_in() != Some(Duration::ZERO) {
            return;
        }
        self.looks.retain(|at| *at > now);
        let flows = self.mark_flows().unwrap_or_else(|error| {
            warn!(%error, "connections to backends that are gone can't be marked");
            0
        });
        let sockets = self.end_sockets().unwrap_or_else(|error| {
            warn!(%error, "sockets that are connected to backends that are gone can't be ended");
            0
        });
        if flows + sockets > 0 {
            info!(sockets, flows, "connections to backends that are gone are reset");
        }
    }

    fn mark_flows(&self) -> Result<usize, DatapathError> {
        let now = Instant::now();
        gone::mark(&self.pins, |backend| self.backends.may_be_there(Protocol::Tcp, *backend, now))
    }

    fn end_sockets(&self) -> Result<usize, DatapathError> {
        let peers = MapData::from_pin(self.pins.map("SOCK_PEERS"))
            .map_err(|source| map_error("open pinned", "SOCK_PEERS", source))?;
        let noted = Noted { peers, connected: open_connected(&self.pins)? };
        let mut ended = 0;
        for namespace in namespaces(self.cgroup_root.as_deref()) {
            match scratch::within(&namespace, || self.end_sockets_here(&noted)).flatten() {
                Ok(sockets) => ended += sockets,
                Err(error) => warn!(%error, "sockets of a network namespace can't be ended"),
            }
        }
        Ok(ended)
    }

    /// In this thread's network namespace.
    fn end_sockets_here(&self, noted: &Noted) -> io::Result<usize> {
        let mut diag = SockDiag::open()?;
        let mut ended = 0;
        for family in [Family::V4, Family::V6] {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                let sockets = diag.connected(family, protocol, noted.peers.fd().as_fd())?;
                for socket in sockets.iter().filter(|socket| self.is_lost(noted, socket)) {
                    diag.destroy(socket)?;
                    ended += 1;
                }
            }
        }
        Ok(ended)
    }

    /// We chose its backend, and that is gone.
    fn is_lost(&self, noted: &Noted, socket: &Connected) -> bool {
        let of_udp = || noted.connected.get(&socket.cookie, 0).ok().map(|Wire(value)| value);
        let backend = socket.noted.or_else(of_udp).and_then(|value| sock_diag::backend(socket, &value));
        backend.is_some_and(|backend| !self.backends.may_be_there(socket.protocol, backend, Instant::now()))
    }
}

/// What connect has noted of sockets.
struct Noted {
    peers: MapData,
    connected: maps::Connected,
}

/// Our own network namespace, and those of the processes below a cgroup, each once. A process that ends meanwhile is left
/// out; so are those of other PID namespaces, of which we see no number.
fn namespaces(cgroup_root: Option<&Path>) -> Vec<File> {
    let mut paths = vec![PathBuf::from("/proc/self/ns/net")];
    for dir in cgroup_root.into_iter().flat_map(folders) {
        let pids = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
        paths.extend(pids.lines().map(|pid| PathBuf::from(format!("/proc/{pid}/ns/net"))));
    }
    let mut seen = BTreeSet::new();
    let open = |path: &PathBuf| {
        let of = fs::metadata(path).ok()?;
        seen.insert((of.dev(), of.ino())).then(|| File::open(path).ok()).flatten()
    };
    paths.iter().filter_map(open).collect()
}

/// A folder and all below it.
fn folders(root: &Path) -> Vec<PathBuf> {
    let mut found = vec![root.to_owned()];
    let mut next = 0;
    while let Some(dir) = found.get(next) {
        let entries: Vec<_> = fs::read_dir(dir).into_iter().flatten().flatten().collect();
        let is_dir = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
        found.extend(entries.iter().filter(|entry| is_dir(entry)).map(fs::DirEntry::path));
        next += 1;
    }
    found
}
