//! Taking over without cutting a connection: what another mode left goes only once this one serves, and then not before
//! its last connection.
//!
//! Each mode leaves in its own way. BPF programs carry on the flows they know ([`drain`]). netfilter keeps its
//! translations as long as somebody uses NAT, which an empty table sees to. IPVS keeps the virtual servers that have
//! connections.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::Result;
use lb_core::{model::Protocol, table::ServiceTable};
use tracing::{info, warn};

use crate::{
    args::Mode,
    conntrack::{Conntrack, Tuple},
    datapath::{
        ebpf::{attach, drain, foreign, maps::Pins},
        iptables, ipvs, nftables,
    },
};

/// Connections that are left, by mode; a mode that is gone has no entry.
pub type Left = BTreeMap<&'static str, u64>;

/// What other modes left, on its way out.
pub struct Retire {
    mode: Mode,
    pins: Pins,
    /// kube-proxy's own rules go, too.
    kube_proxy: bool,
    /// Modes that may have left something, each until it is gone.
    leaving: Vec<Mode>,
    /// netfilter has translations that outlive their rules.
    keeper: bool,
    /// When netfilter was last told of masqueraded flows that are not its own.
    held: Option<Instant>,
    left: Left,
}

/// How long netfilter believes in a connection that it was told of, in seconds, and how often it is told.
const HOLD_SECS: u32 = 900;
const HOLD_EVERY: Duration = Duration::from_secs(300);

impl Retire {
    /// Nothing is known yet of what there is.
    pub fn new(mode: Mode, pins: Pins, kube_proxy: bool) -> Self {
        let all = [Mode::Ebpf, Mode::Nftables, Mode::Iptables, Mode::Ipvs];
        let leaving = all.into_iter().filter(|other| *other != mode).collect();
        Self { mode, pins, kube_proxy, leaving, keeper: true, held: None, left: Left::new() }
    }

    /// Something is still there.
    pub fn is_pending(&self) -> bool {
        !self.leaving.is_empty() || self.keeper
    }

    /// Takes the next step: to be called once this mode serves `table`, and again as long as something is pending.
    pub fn step(&mut self, table: &ServiceTable) -> Result<Left> {
        let mut left = Left::new();
        for mode in std::mem::take(&mut self.leaving) {
            // On an error it is tried again.
            let connections = self.leave(mode, table).inspect_err(|_| self.leaving.push(mode))?;
            if connections > 0 {
                left.insert(mode.name(), connections);
                self.leaving.push(mode);
            }
        }
        if self.keeper {
            let translated = foreign::translated(table);
            if translated == 0 {
                nftables::remove_keepers()?;
                iptables::remove_keepers()?;
                self.keeper = false;
            } else if nftables::has_keeper() || !iptables::keepers().is_empty() {
                left.insert("netfilter", translated);
            } else {
                // Translations of rules that somebody still has.
                self.keeper = false;
            }
        }
        for (mode, connections) in &left {
            if !self.left.contains_key(mode) {
                info!(mode, connections, "connections of another mode are carried on until they end");
            }
        }
        for mode in self.left.keys().filter(|mode| !left.contains_key(*mode)) {
            info!(mode, "the last connection of another mode has ended");
        }
        self.left.clone_from(&left);
        Ok(left)
    }

    /// One mode's next step; returns how many connections it has left. With none, it is gone.
    fn leave(&mut self, mode: Mode, table: &ServiceTable) -> Result<u64> {
        match mode {
            Mode::Ebpf => self.leave_ebpf(table),
            // Both modes write all of these chains anew when they start.
            Mode::Iptables if self.mode == Mode::Ipvs => {
                iptables::counters::remove_unused();
                Ok(0)
            }
            Mode::Iptables => self.leave_iptables(),
            Mode::Nftables => {
                for family in nftables::removals(self.kube_proxy) {
                    info!(%family, "the nftables table is removed: this mode serves instead");
                    nftables::retire(family)?;
                }
                Ok(0)
            }
            Mode::Ipvs => Ok(ipvs::drain(self.kube_proxy)?),
        }
    }

    fn leave_iptables(&self) -> Result<u64> {
        let removals = iptables::removals(self.kube_proxy)?;
        for (programs, removal) in &removals {
            info!(program = programs.name(), "the iptables rules are removed: this mode serves instead");
            if nftables::keep(programs.family).is_err() {
                iptables::keep(*programs)?;
            }
            programs.restore(&removal.to_string())?;
        }
        if !removals.is_empty() {
            iptables::counters::remove_unused();
        }
        Ok(0)
    }

    fn leave_ebpf(&mut self, table: &ServiceTable) -> Result<u64> {
        let pins = &self.pins;
        if !pins.dir().is_dir() {
            // Programs of another layout don't know how to drain.
            attach::remove_all(pins)?;
            return Ok(0);
        }
        if !drain::is_set(pins)? {
            info!(pins = %pins.dir().display(), "the eBPF datapath takes no new flows: this mode serves instead");
            // Told before, and once more below of flows that began meanwhile.
            hold(&drain::flows_left(pins, |_| true)?.masqueraded);
            drain::set(pins, true)?;
        }
        let udp = table.services.iter().filter(|(id, _)| id.protocol == Protocol::Udp);
        let serving: BTreeSet<SocketAddr> =
            udp.flat_map(|(_, service)| service.in_use()).map(SocketAddr::from).collect();
        let left = drain::flows_left(pins, |backend| serving.contains(backend))?;
        if self.held.is_none_or(|at| at.elapsed() >= HOLD_EVERY) {
            self.held = Some(Instant::now());
            hold(&left.masqueraded);
        }
        if left.flows == 0 {
            info!(pins = %pins.dir().display(), "the eBPF datapath is removed: its last flow has ended");
            attach::remove_all(pins)?;
        }
        Ok(left.flows)
    }
}

/// Keeps netfilter from masquerading to addresses and ports whose replies are the programs'.
fn hold(masqueraded: &[Tuple]) {
    let Ok(mut conntrack) = Conntrack::open() else { return };
    let errors: Vec<std::io::Error> =
        masqueraded.iter().filter_map(|tuple| conntrack.hold(tuple, HOLD_SECS).err()).collect();
    if let Some(error) = errors.first() {
        warn!(%error, flows = errors.len(), "netfilter can't be told of masqueraded flows: it may use their ports again");
    }
}
