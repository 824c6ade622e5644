//! kube-proxy's IPVS mode without what made it dangerous: no address of any node is ever bound.

pub mod exec;

use std::{collections::BTreeMap, fs, net::SocketAddr, path::Path};

use lb_core::{
    model::Family,
    rules::{
        iptables::{Config, Translation},
        ipvs::{DEVICE, Scheduler, Servers, State, Transaction, sets::Set},
    },
    table::{Changes, FrontendAddr, ServiceTable},
};
use tracing::{info, warn};

use super::{ApplyReport, Datapath, DatapathError, Refused, iptables::IptablesDatapath};

/// How IPVS is set up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IpvsConfig {
    /// Which destination a connection gets.
    pub scheduler: Scheduler,
    /// Answer ARP for addresses of the asked device only: bound VIPs stay silent.
    pub strict_arp: bool,
    /// When connections are forgotten.
    pub timeouts: Timeouts,
}

/// When IPVS forgets what is idle, in seconds; 0 leaves what the kernel has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timeouts {
    /// TCP connections.
    pub tcp: u64,
    /// TCP connections after a FIN.
    pub tcp_fin: u64,
    /// UDP flows.
    pub udp: u64,
}

impl Timeouts {
    fn set(self) -> Result<(), DatapathError> {
        if self == Self::default() {
            return Ok(());
        }
        let [tcp, tcp_fin, udp] = [self.tcp, self.tcp_fin, self.udp].map(|secs| secs.to_string());
        exec::output(&["ipvsadm", "--set", &tcp, &tcp_fin, &udp]).map(drop)
    }
}

/// Virtual servers and the rules beside them.
pub struct IpvsDatapath {
    rules: IptablesDatapath,
    families: Vec<FamilyServers>,
}

/// The virtual servers of one family.
struct FamilyServers {
    servers: Servers,
    /// The kernel's state is what `servers` asked for, but for what it refused.
    known: bool,
    /// Destinations that the kernel does not take, and what ipvsadm says of them.
    refused: BTreeMap<(FrontendAddr, SocketAddr), String>,
}

/// The device's alias that says it is ours, not kube-proxy's.
const ALIAS: &str = "lb-agent";

impl IpvsDatapath {
    /// Finds the programs and prepares the host.
    pub fn open(rules: Config, config: IpvsConfig) -> Result<Self, DatapathError> {
        let rules = IptablesDatapath::open(Config { translation: Translation::Ipvs, ..rules })?;
        // ipvsadm loads the module ip_vs.
        exec::output(&["ipvsadm", "-Sn"])?;
        set_sysctls(config.strict_arp);
        config.timeouts.set()?;
        let families: Vec<FamilyServers> = rules
            .families()
            .map(|family| FamilyServers {
                servers: Servers::new(family, config.scheduler),
                known: false,
                refused: BTreeMap::new(),
            })
            .collect();
        Ok(Self { rules, families })
    }
}

/// As kube-proxy sets them; a value that can't be set is named.
fn set_sysctls(strict_arp: bool) {
    let mut sysctls = vec![
        // Else netfilter sees nothing of IPVS's connections, and nothing is masqueraded.
        ("net/ipv4/vs/conntrack", "1"),
        ("net/ipv4/vs/expire_nodest_conn", "1"),
        ("net/ipv4/vs/expire_quiescent_template", "1"),
    ];
    // Before 5.9 a reused port's first packet was dropped, a second later it worked (kubernetes issue 93297).
    if kernel_version() < (5, 9) {
        sysctls.push(("net/ipv4/vs/conn_reuse_mode", "0"));
    }
    if strict_arp {
        sysctls.extend([("net/ipv4/conf/all/arp_ignore", "1"), ("net/ipv4/conf/all/arp_announce", "2")]);
    }
    for (sysctl, value) in sysctls {
        if let Err(error) = fs::write(Path::new("/proc/sys").join(sysctl), value) {
            warn!(%error, sysctl, value, "can't be set");
        }
    }
}

fn kernel_version() -> (u32, u32) {
    let text = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = text.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

impl Datapath for IpvsDatapath {
    fn name(&self) -> &'static str {
        "ipvs"
    }

    fn apply(&mut self, table: &ServiceTable, changes: &Changes) -> Result<ApplyReport, DatapathError> {
        if self.families.iter().any(|family| !family.known) {
            make_device()?;
            for family in &self.families {
                let family = family.servers.family();
                let sets = Set::ALL.map(|set| format!("{}\n", set.create(family)));
                exec::run(&["ipset", "restore"], &sets.concat())?;
            }
        }
        // Rules first: no address is bound before what protects it is there.
        let mut report = self.rules.apply(table, changes)?;
        for family in &mut self.families {
            let transaction = family.apply(table, changes)?;
            report.upserts += transaction.upserts();
            report.deletes += transaction.deletes();
            report.refused.extend(family.refused(table));
        }
        Ok(report)
    }

    fn is_intact(&mut self, table: &ServiceTable) -> bool {
        let rules = self.rules.is_intact(table);
        // All are asked: one that was changed forgets what it knew.
        let intact: Vec<bool> = self.families.iter_mut().map(FamilyServers::is_intact).collect();
        rules && intact.into_iter().all(|intact| intact)
    }
}

/// Makes the dummy device, or takes over kube-proxy's.
fn make_device() -> Result<(), DatapathError> {
    match exec::device()? {
        Some(alias) if alias == ALIAS => return Ok(()),
        Some(_) => info!(device = DEVICE, "taken over"),
        None => drop(exec::output(&["ip", "link", "add", DEVICE, "type", "dummy"])?),
    }
    exec::output(&["ip", "link", "set", DEVICE, "alias", ALIAS]).map(drop)
}

impl FamilyServers {
    fn apply(&mut self, table: &ServiceTable, changes: &Changes) -> Result<Transaction, DatapathError> {
        // Until all is written the state is unknown, and the next call asks the kernel.
        let known = std::mem::replace(&mut self.known, false);
        if !known {
            self.refused.clear();
        }
        let transaction = match known {
            true => self.servers.update(table, changes),
            false => self.servers.replace(table, &exec::actual(self.servers.family())?),
        };
        self.carry_out(&transaction)?;
        self.known = true;
        Ok(transaction)
    }

    /// Carries a transaction out, as far as the kernel takes it.
    fn carry_out(&mut self, transaction: &Transaction) -> Result<(), DatapathError> {
        let Err(error) = exec::carry_out(transaction) else { return Ok(()) };
        let actual = exec::actual(self.servers.family())?;
        let missing = self.servers.state().missing_destinations(&actual);
        let Some(missing) = missing else { return Err(error) };
        let reason = format!("{:#}", anyhow::Error::from(error));
        self.refused = missing.into_iter().map(|destination| (destination, reason.clone())).collect();
        Ok(())
    }

    /// What the kernel refused, by service port.
    fn refused(&self, table: &ServiceTable) -> impl Iterator<Item = Refused> {
        self.refused.iter().filter_map(|((server, destination), reason)| {
            let service = table.frontends.get(server)?.service.clone();
            let reason =
                format!("the kernel takes no destination {destination} of virtual server {server}: {reason}");
            Some(Refused { service, reason })
        })
    }

    /// What should be there.
    fn expected(&self) -> State {
        let mut state = self.servers.state();
        for (server, destination) in self.refused.keys() {
            if let Some(server) = state.servers.get_mut(server) {
                server.destinations.remove(destination);
            }
        }
        state
    }

    /// Offers the kernel once more what it refused: routes may have changed.
    fn offer_again(&mut self) -> Result<(), DatapathError> {
        if self.refused.is_empty() {
            return Ok(());
        }
        let missing = Transaction::between(self.servers.family(), &self.expected(), &self.servers.state());
        self.refused.clear();
        self.carry_out(&missing)
    }

    /// Deletes destinations whose last connection has ended, and looks whether all is there.
    fn is_intact(&mut self) -> bool {
        if !self.known {
            return true;
        }
        match self.sweep().and_then(|()| self.offer_again()).and_then(|()| self.differs()) {
            Ok(false) => true,
            Ok(true) => {
                warn!(family = %self.servers.family(), "somebody changed virtual servers, sets or addresses; all are looked through");
                self.known = false;
                false
            }
            // Nothing is known: what is there stays.
            Err(error) => {
                warn!(%error, "can't look after the virtual servers");
                true
            }
        }
    }

    fn sweep(&mut self) -> Result<(), DatapathError> {
        if self.servers.draining() == 0 {
            return Ok(());
        }
        let text = fs::read_to_string("/proc/net/ip_vs").unwrap_or_default();
        let connections = exec::connections(&text);
        let swept = self
            .servers
            .sweep(|server, destination| connections.get(&(*server, *destination)).is_none_or(|n| *n == 0));
        self.carry_out(&swept)
    }

    fn differs(&self) -> Result<bool, DatapathError> {
        Ok(exec::actual(self.servers.family())? != self.expected())
    }
}

/// Lets connections of our virtual servers end, now that another mode takes the new ones: whatever has none left is
/// removed, the rest gets no more. Returns how many connections are left; with 0, nothing of ours is. An address stays
/// bound as long as it has connections, without the rules that guard its other ports.
///
/// With `all`, also what kube-proxy left.
pub fn drain(all: bool) -> Result<u64, DatapathError> {
    let Ok(Some(alias)) = exec::device() else { return Ok(0) };
    if !all && alias != ALIAS {
        return Ok(0);
    }
    let connections = exec::connections(&fs::read_to_string("/proc/net/ip_vs").unwrap_or_default());
    let mut left = 0;
    for family in [Family::V4, Family::V6] {
        let actual = exec::actual(family)?;
        let ours = connections.iter().filter(|((server, _), _)| actual.servers.contains_key(server));
        left += ours.map(|(_, count)| count).sum::<u64>();
        let drained =
            actual.drained(|server| connections.iter().any(|((of, _), count)| of == server && *count > 0));
        exec::carry_out(&Transaction::between(family, &actual, &drained))?;
    }
    if left == 0 {
        remove(&removals(all)?)?;
    }
    Ok(left)
}

/// What our agent, or with `all` kube-proxy too, left of one family.
pub fn removals(all: bool) -> Result<Vec<Transaction>, DatapathError> {
    // Without the programs, or without the device, there is nothing of ours.
    let Ok(Some(alias)) = exec::device() else { return Ok(Vec::new()) };
    if !all && alias != ALIAS {
        return Ok(Vec::new());
    }
    let mut removals = Vec::new();
    for family in [Family::V4, Family::V6] {
        removals.push(Transaction::between(family, &exec::actual(family)?, &State::default()));
    }
    Ok(removals)
}

/// Removes what [`removals`] named, then sets and device. Rules that speak of the sets have to be gone.
pub fn remove(removals: &[Transaction]) -> Result<(), DatapathError> {
    if removals.is_empty() {
        return Ok(());
    }
    for removal in removals {
        exec::carry_out(removal)?;
    }
    exec::run(&["ipset", "restore"], &destroyed_sets()?)?;
    exec::output(&["ip", "link", "del", DEVICE]).map(drop)
}

/// Lines that destroy the sets that are there.
pub fn destroyed_sets() -> Result<String, DatapathError> {
    let listed = exec::output(&["ipset", "list", "-n"])?;
    let ours =
        |name: &&str| [Family::V4, Family::V6].into_iter().any(|family| Set::by_name(family, name).is_some());
    Ok(listed.lines().filter(ours).map(|name| format!("destroy {name}\n")).collect())
}
