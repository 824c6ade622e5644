//! `run`: wires source, compiler, datapath and network together.
//!
//! One thread owns the compiler and the datapath: what it is told comes as [`Input`], a closed set. Nothing is
//! programmed before the source has reported everything and the node's addresses are known.

use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    net::IpAddr,
    os::fd::AsRawFd,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc as std_mpsc},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow};
use ipnet::IpNet;
use lb_common::abi::{DeviceValue, NodeConfig, device_flags, node_flags};
use lb_core::{
    compile::{Compiler, NodeView, WarningChanges},
    model::{Event, Warning},
    rules,
    table::Changes,
};
use tokio::sync::{Notify, mpsc};
use tracing::{info, warn};

use crate::{
    args::{Config, Mode, OnBackendGone, RunArgs, SourceConfig},
    config::{self, File, settings::DetectLocal, watch::Watched},
    datapath::{
        Datapath,
        ebpf::{
            apply::EbpfDatapath,
            attach::Attacher,
            grow::Growth,
            load::{Generation, Loader},
            maps::{NodeMaps, Pins},
            sizes::{self, Capacity},
        },
        iptables::IptablesDatapath,
        ipvs::IpvsDatapath,
        nftables::NftablesDatapath,
    },
    drift::dry_run::DryRun,
    log::Log,
    netlink::{self, HostNetwork, Netlink},
    reconcile::Reconciler,
    reset::Resetter,
    retire::Retire,
    room::{Place, Room},
    serve::{self, Health},
    source::{
        AbortOnDrop, About, Notice, Noticed, Notices, Report, Source, calls::Calls, kubernetes::Kubernetes,
        manifests::Manifests,
    },
    told::Told,
};

/// What the programming thread is told.
#[derive(Debug)]
enum Input {
    /// From the source; dropped, it gives its place back.
    Source(Report, #[expect(dead_code, reason = "what counts is that it is dropped")] Place),
    /// This node's own addresses.
    Addresses(Vec<IpAddr>),
}

/// Tells the programming thread. Once it is dropped the thread ends, at the latest when it has written what it is writing.
struct Teller {
    inputs: std_mpsc::Sender<Input>,
    _end: std_mpsc::Sender<Infallible>,
}

/// What the programming thread listens to.
struct Listener {
    inputs: std_mpsc::Receiver<Input>,
    /// Says nothing, and is cut at the end.
    end: std_mpsc::Receiver<Infallible>,
}

impl Teller {
    fn channel() -> (Self, Listener) {
        let ((inputs, listened), (end, ended)) = (std_mpsc::channel(), std_mpsc::channel());
        (Self { inputs, _end: end }, Listener { inputs: listened, end: ended })
    }

    fn tell(&self, input: Input) -> Result<()> {
        self.inputs.send(input).map_err(|_| anyhow!("the programming thread is gone"))
    }
}

impl Listener {
    /// Waits; returns whether it is time to end.
    fn ends_within(&self, time: Duration) -> bool {
        self.end.recv_timeout(time) == Err(std_mpsc::RecvTimeoutError::Disconnected)
    }
}

/// Reports that may wait to be passed on.
const QUEUE: usize = 256;

/// Serves the node until SIGTERM or SIGINT; a new configuration makes it begin anew. The datapath goes on serving all the
/// while, and after that.
pub async fn run(options: RunArgs, mut file: File, bpf_root: PathBuf, log: &Log) -> Result<()> {
    let health = Arc::new(Health::default());
    let mut config = options.resolve(&file, &bpf_root)?;
    let mut last = None;
    let mut given_up = GivenUp::default();
    // For all that is served: what comes while one ends and the next begins counts.
    let mut stop = Stop::new()?;
    loop {
        log.follow(&config.settings.logging);
        let configuration = Watched::new(&options, &file, &bpf_root, given_up.again());
        match serve(&config, configuration, health.clone(), &mut last, &mut stop).await {
            Ok(Ended::Stopped) => return Ok(()),
            Ok(Ended::Reconfigured(changed)) => {
                let (new, read) = *changed;
                given_up.leave(read == file);
                last = Some(std::mem::replace(&mut config, new));
                file = read;
            }
            Err(error) => {
                let Some(before) = last.take() else { return Err(error) };
                given_up.enter();
                let again = given_up.again().map_or(0, |wait| wait.as_secs());
                warn!(problem = %format!("{error:#}"), again_in_s = again, "the configuration can't be used; the last one holds");
                config = before;
            }
        }
    }
}

/// A configuration that could not be begun with: maybe it can be later, without a change of its file.
#[derive(Default)]
struct GivenUp {
    /// One before it holds.
    now: bool,
    /// How often it was tried.
    tries: u32,
}

/// Waits between two tries to begin with a configuration: first and longest. Each is a restart.
const BEGIN_AGAIN: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(600));

impl GivenUp {
    fn enter(&mut self) {
        (self.now, self.tries) = (true, self.tries + 1);
    }

    /// It is tried again, or another one is.
    fn leave(&mut self, is_same: bool) {
        self.now = false;
        if !is_same {
            self.tries = 0;
        }
    }

    /// When to try it again, if it has been given up.
    fn again(&self) -> Option<Duration> {
        let doubled = BEGIN_AGAIN.0 * 2u32.saturating_pow(self.tries.saturating_sub(1)).min(1 << 10);
        self.now.then(|| doubled.min(BEGIN_AGAIN.1))
    }
}

/// Why serving ended.
enum Ended {
    /// A signal.
    Stopped,
    /// A new configuration, and the file that it is from.
    Reconfigured(Box<(Config, File)>),
}

/// Serves with a configuration; once it has begun, `last` is not needed any more.
async fn serve(
    config: &Config,
    mut configuration: Watched<'_>,
    health: Arc<Health>,
    last: &mut Option<Config>,
    stop: &mut Stop,
) -> Result<Ended> {
    let pins = Pins::new(&config.bpf_root);
    let mut netlink = Netlink::connect(config.settings.devices.clone())?;
    let network = netlink.read().await?;
    let mut host = match config.mode {
        Mode::Ebpf if !config.dry_run => Some(Host::start(config, &pins)?),
        Mode::Ebpf | Mode::Nftables | Mode::Iptables | Mode::Ipvs => None,
    };
    let follow = |host: &mut Option<Host>, network: &HostNetwork| {
        host.as_mut().map_or(Ok(()), |host| host.follow(network))
    };
    follow(&mut host, &network)?;

    health.start(config.node_name.clone(), config.mode, config.sync_period);
    health.set_configz(config.in_force.clone());
    config.settings.warn();
    config::set_oom_score(config.settings.oom_score_adj);
    let (notices, noticed) = Notices::channel();
    let (teller, listener) = Teller::channel();
    let mut conntrack_is_set = config.dry_run || config::conntrack::set(&config.settings.conntrack);
    let datapath = open_datapath(config, &config.rules, &health, host.as_ref().map(Host::growth))?;
    warn_of_forwarding();
    let programmed = Arc::new(Notify::new());
    let worker = {
        let (config, health, programmed) = (config.clone(), health.clone(), programmed.clone());
        let notices = notices.clone();
        thread::Builder::new()
            .name("program".into())
            .spawn(move || Worker::new(&config, datapath, health, programmed, notices).work(&listener))
            .context("start the programming thread")?
    };
    teller.tell(Input::Addresses(network.addresses.clone()))?;

    let (reports, mut reported) = mpsc::channel(QUEUE);
    let mut source = tokio::spawn(start_source(config, health.calls(), reports, noticed));
    let source_end = AbortOnDrop(source.abort_handle());
    let servers = serve::start(config, health.clone(), pins.clone(), notices).await?;
    *last = None;
    let mut addresses = network.addresses;
    let (room, mut next) = (Room::default(), None);
    let result = loop {
        tokio::select! {
            Some(report) = reported.recv(), if next.is_none() => {
                // Told here too: the programming thread may be busy for long.
                if matches!(report, Report::Changed(_)) {
                    health.queued_anew();
                }
                next = Some(report);
            }
            Some(place) = room.place(next.as_ref()) => {
                if let Some(report) = next.take() {
                    teller.tell(Input::Source(report, place))?;
                }
            }
            () = netlink.changed() => match netlink.read().await {
                Ok(network) => {
                    follow(&mut host, &network)?;
                    if network.addresses != addresses {
                        addresses.clone_from(&network.addresses);
                        teller.tell(Input::Addresses(network.addresses))?;
                    }
                }
                Err(error) => warn!(error = %format!("{error:#}"), "the node's network can't be read; the last state holds"),
            },
            () = programmed.notified(), if !config.dry_run => {
                // Rules may have loaded it only now.
                conntrack_is_set = conntrack_is_set || config::conntrack::set(&config.settings.conntrack);
                if let Some(host) = &mut host {
                    host.take_new_flows()?;
                }
                if host.as_mut().is_some_and(|host| host.attacher().retire_others()) {
                    match netlink.read().await {
                        Ok(network) => follow(&mut host, &network)?,
                        Err(error) => warn!(error = %format!("{error:#}"), "the node's network can't be read; some hooks stay empty"),
                    }
                }
            },
            ended = &mut source => break ended.context("the source panicked")?.and(Err(anyhow!("the source ended"))),
            changed = configuration.changed() => break Ok(Ended::Reconfigured(Box::new(changed))),
            signal = stop.wait() => {
                info!(signal, "stopping; the kernel goes on serving");
                break Ok(Ended::Stopped);
            }
        }
    };
    drop(source_end);
    drop(teller);
    // It ends with what it is writing, which can take long: the servers answer until then.
    let mut joined = tokio::task::spawn_blocking(|| worker.join());
    let (joined, result) = tokio::select! {
        joined = &mut joined => (joined, result),
        signal = stop.wait() => {
            info!(signal, "stopping once what is being written is written");
            (joined.await, Ok(Ended::Stopped))
        }
    };
    servers.stop().await;
    joined?.map_err(|_| anyhow!("the programming thread panicked"))?;
    result
}

/// What carries tables out, with these rules.
fn open_datapath(
    config: &Config,
    rules: &rules::iptables::Config,
    health: &Arc<Health>,
    growth: Option<Growth>,
) -> Result<Box<dyn Datapath>> {
    let pins = Pins::new(&config.bpf_root);
    Ok(match config.mode {
        _ if config.dry_run => Box::new(DryRun::open(config, rules, &pins, health.clone())?),
        Mode::Ebpf => {
            let datapath = EbpfDatapath::open(&pins)?;
            Box::new(match growth {
                Some(growth) => datapath.growing(growth),
                None => datapath,
            })
        }
        Mode::Nftables => Box::new(NftablesDatapath::open(rules)?),
        Mode::Iptables => Box::new(IptablesDatapath::open(rules.clone())?),
        Mode::Ipvs => Box::new(IpvsDatapath::open(rules.clone(), config.ipvs)?),
    })
}

fn start_source(
    config: &Config,
    calls: Calls,
    reports: mpsc::Sender<Report>,
    notices: mpsc::Receiver<Noticed>,
) -> std::pin::Pin<Box<dyn Future<Output = Result<()>> + Send>> {
    match config.source.clone() {
        SourceConfig::Manifests(dir) => Box::pin(Manifests::new(dir).run(reports)),
        SourceConfig::Kubernetes(access) => {
            let (node, events) = (config.node_name.clone(), !config.dry_run);
            Box::pin(Kubernetes { access, node, events, calls, notices }.run(reports))
        }
    }
}

/// SIGTERM and SIGINT.
struct Stop {
    term: tokio::signal::unix::Signal,
    int: tokio::signal::unix::Signal,
}

impl Stop {
    fn new() -> Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self { term: signal(SignalKind::terminate())?, int: signal(SignalKind::interrupt())? })
    }

    async fn wait(&mut self) -> &'static str {
        tokio::select! {
            _ = self.term.recv() => "SIGTERM",
            _ = self.int.recv() => "SIGINT",
        }
    }
}

/// The node's side of the datapath: programs on devices, and what they know of the node.
struct Host {
    loader: Loader,
    /// The programming thread puts others in if its maps grow.
    attacher: Arc<Mutex<Attacher>>,
    map_entries_max: u32,
    maps: NodeMaps,
    node: NodeConfig,
}

impl Host {
    fn start(config: &Config, pins: &Pins) -> Result<Self> {
        let flows = config.settings.flows_max.unwrap_or_else(default_flows);
        let mut loader = Loader::new(pins, flows);
        if let Some(filter) = config.trace {
            loader = loader.tracing(filter);
        }
        let map_entries_max = config.settings.map_entries_max;
        let programs = loader.load(Capacity::LEAST.at_most(map_entries_max), Generation::Present)?;
        let maps = NodeMaps::open(pins)?;
        let before = maps.node()?;
        let (snat_port_first, snat_port_count) = netlink::snat_ports(netlink::ephemeral_ports());
        if snat_port_count == 0 {
            warn!("net.ipv4.ip_local_port_range leaves no ports for masqueraded flows: make it smaller");
        }
        let node = NodeConfig {
            host_netns_cookie: netns_cookie().context("read the network namespace's cookie (kernel 5.14)")?,
            routing_generation: before.routing_generation,
            // Programs that drain go on with that until the maps are full.
            flags: before.flags & node_flags::DRAINING
                | if config.on_backend_gone == OnBackendGone::Reset { node_flags::RESETS } else { 0 },
            snat_port_first,
            snat_port_count,
            ..NodeConfig::default()
        };
        let mut attacher = Attacher::new(pins.clone(), programs, config.settings.modes);
        match &config.cgroup_root {
            Ok(root) => attacher.attach_cgroup(root)?,
            Err(reason) => {
                warn!(reason, "no socket hooks: pods are served at their veths, host processes are not");
            }
        }
        Ok(Self { loader, attacher: Arc::new(Mutex::new(attacher)), map_entries_max, maps, node })
    }

    fn attacher(&self) -> MutexGuard<'_, Attacher> {
        self.attacher.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the datapath's maps grow.
    fn growth(&self) -> Growth {
        Growth::new(self.loader.clone(), self.attacher.clone(), self.map_entries_max)
    }

    /// The maps hold the whole cluster: programs that left new flows to another mode take them again.
    fn take_new_flows(&mut self) -> Result<()> {
        if self.node.flags & node_flags::DRAINING != 0 {
            self.node.flags &= !node_flags::DRAINING;
            self.maps.set_node(self.node)?;
        }
        Ok(())
    }

    /// Attaches to what is there now and tells the programs.
    fn follow(&mut self, network: &HostNetwork) -> Result<()> {
        let mut attacher = self.attacher();
        attacher.sync(&network.devices);
        let devices: Vec<(u32, DeviceValue)> = network
            .devices
            .iter()
            .map(|device| {
                let target = attacher.xdp_targets().contains(&device.ifindex);
                let value = DeviceValue {
                    flags: if target { device_flags::XDP_TARGET } else { 0 },
                    addr4: device.addr4.map(|addr| addr.octets()).unwrap_or_default(),
                    addr6: device.addr6.map(|addr| addr.octets()).unwrap_or_default(),
                };
                (device.ifindex, value)
            })
            .collect();
        drop(attacher);
        self.maps.set_devices(&devices)?;
        self.node.routing_generation = self.node.routing_generation.wrapping_add(1);
        self.node.addr4 = network.main4.map(|addr| addr.octets()).unwrap_or_default();
        self.node.addr6 = network.main6.map(|addr| addr.octets()).unwrap_or_default();
        self.maps.set_node(self.node)?;
        Ok(())
    }
}

fn warn_of_forwarding() {
    for sysctl in netlink::forwarding_off() {
        warn!(sysctl, "is 0: packets to pods and other nodes are not forwarded; set it to 1");
    }
}

/// Entries of flow tables as they suit this node.
fn default_flows() -> u32 {
    let cpus =
        thread::available_parallelism().map_or(1, |cpus| u32::try_from(cpus.get()).unwrap_or(u32::MAX));
    // SAFETY: it only asks; an unknown answer is -1.
    let (pages, page) = unsafe { (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE)) };
    sizes::flows(cpus, u64::try_from(pages).unwrap_or(0) * u64::try_from(page).unwrap_or(0))
}

/// The cookie of this process's network namespace (`SO_NETNS_COOKIE`).
fn netns_cookie() -> std::io::Result<u64> {
    let socket =
        std::net::UdpSocket::bind("127.0.0.1:0").or_else(|_| std::net::UdpSocket::bind("[::1]:0"))?;
    let mut cookie = 0u64;
    let mut len = size_of::<u64>() as libc::socklen_t;
    // SAFETY: cookie is eight bytes long, as len says.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut len,
        )
    };
    if result == 0 { Ok(cookie) } else { Err(std::io::Error::last_os_error()) }
}

/// `include/uapi/asm-generic/socket.h`.
const SO_NETNS_COOKIE: i32 = 71;

/// The programming thread.
struct Worker {
    compiler: Compiler,
    datapath: Box<dyn Datapath>,
    /// This node's name.
    node: Arc<str>,
    /// Told of what is refused.
    notices: Notices,
    health: Arc<Health>,
    /// Told once the maps hold the whole cluster.
    programmed: Arc<Notify>,
    /// Least time between two writes.
    interval: Duration,
    /// Time between two looks at what others may have done to what was written.
    sync_period: Duration,
    /// With `detectLocalMode: NodeCIDR`, what the rules are made with.
    by_pod_cidrs: Option<ByPodCidrs>,
    /// What other modes left; a dry run leaves it alone.
    retire: Option<Retire>,
    /// Ends netfilter's flows to backends that are gone, where netfilter translates.
    reconciler: Option<Reconciler>,
    /// Resets connections to backends that are gone, if told to.
    resetter: Option<Resetter>,
    /// Changes since the last success.
    pending: Changes,
    /// All has to be programmed again.
    anew: bool,
    synced: bool,
    addressed: bool,
    /// The cluster has a Node for every node, unlike folders of manifests.
    needs_node: bool,
    /// Of sources, by their origin.
    warnings: BTreeMap<String, Vec<Warning>>,
    told: Told,
    refused: BTreeSet<String>,
}

/// The first list is as large as the cluster, and the C library keeps what was freed after it.
fn give_memory_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes nothing that is in use, and may be called at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// How rules follow the ranges of this node's pods.
struct ByPodCidrs {
    config: Config,
    known: Option<Vec<IpNet>>,
}

impl ByPodCidrs {
    fn new(config: &Config) -> Option<Self> {
        let needed = config.settings.detect_local == DetectLocal::NodeCidr && config.mode != Mode::Ebpf;
        needed.then(|| Self { config: config.clone(), known: None })
    }
}

/// How often other modes are asked whether their connections have ended.
const RETIRE_EVERY: Duration = Duration::from_secs(5);

/// Waits between tries after a failed write: first and longest.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));

impl Worker {
    /// Starts with an empty cluster.
    fn new(
        config: &Config,
        datapath: Box<dyn Datapath>,
        health: Arc<Health>,
        programmed: Arc<Notify>,
        notices: Notices,
    ) -> Self {
        let node = NodeView { name: config.node_name.clone(), ..NodeView::default() };
        Self {
            compiler: Compiler::new(config.compile.clone(), node),
            datapath,
            node: config.node_name.clone(),
            notices,
            health,
            programmed,
            interval: config.min_sync_period,
            sync_period: config.sync_period,
            by_pod_cidrs: ByPodCidrs::new(config),
            retire: (!config.dry_run)
                .then(|| Retire::new(config.mode, Pins::new(&config.bpf_root), config.replace_kube_proxy)),
            reconciler: (config.mode != Mode::Ebpf && !config.dry_run).then(Reconciler::default),
            resetter: (config.on_backend_gone == OnBackendGone::Reset && !config.dry_run)
                .then(|| Resetter::new(Pins::new(&config.bpf_root), config.cgroup_root.clone().ok())),
            pending: Changes::default(),
            anew: false,
            synced: false,
            addressed: false,
            needs_node: matches!(config.source, SourceConfig::Kubernetes(_)),
            warnings: BTreeMap::new(),
            told: Told::default(),
            refused: BTreeSet::new(),
        }
    }

    /// Takes inputs until told to end.
    fn work(mut self, listener: &Listener) {
        let mut retry = None;
        let mut wait = RETRY.0;
        let mut first = true;
        let (mut checked, mut retired) = (Instant::now(), None);
        let mut written: Option<Instant> = None;
        loop {
            let check_every = self.datapath.check_every(self.sync_period);
            let patience = if self.is_retiring() { RETIRE_EVERY.min(check_every) } else { check_every };
            let patience = self.follow_up_in().map_or(patience, |due| due.min(patience));
            let input = listener.inputs.recv_timeout(retry.unwrap_or(patience));
            match input {
                Err(std_mpsc::RecvTimeoutError::Disconnected) => return,
                Ok(input) => {
                    self.take(input);
                    // At once after a quiet time; else what comes meanwhile is written together.
                    let rest =
                        written.map_or(Duration::ZERO, |at| self.interval.saturating_sub(at.elapsed()));
                    if listener.ends_within(rest) {
                        return;
                    }
                    while let Ok(input) = listener.inputs.try_recv() {
                        self.take(input);
                    }
                }
                Err(std_mpsc::RecvTimeoutError::Timeout) => {}
            }
            if checked.elapsed() >= check_every {
                checked = Instant::now();
                if !self.datapath.is_intact(self.compiler.table()) {
                    self.pending.merge(Changes::all(self.compiler.table()));
                    self.anew = true;
                    self.health.queued_anew();
                }
            }
            if !(self.synced && self.addressed) {
                continue;
            }
            written = Some(Instant::now());
            match self.follow_pod_cidrs().and_then(|()| self.sync(first)) {
                Ok(()) => {
                    if first {
                        self.programmed.notify_one();
                        give_memory_back();
                    }
                    (retry, wait, first) = (None, RETRY.0, false);
                    self.follow_up();
                    if self.is_retiring() && retired.is_none_or(|at: Instant| at.elapsed() >= RETIRE_EVERY) {
                        retired = Some(Instant::now());
                        self.retire_others();
                    }
                }
                Err(error) => {
                    warn!(error = %format!("{error:#}"), retry_ms = wait.as_millis() as u64, "not programmed; trying again");
                    self.health.failed(&error);
                    self.anew = true;
                    retry = Some(wait);
                    wait = (wait * 2).min(RETRY.1);
                }
            }
        }
    }

    fn take(&mut self, input: Input) {
        match input {
            Input::Source(Report::Changed(events), _) => {
                self.health.queued(&events);
                events.into_iter().for_each(|event: Event| self.compiler.apply(event));
            }
            Input::Source(Report::Synced, _) => {
                self.synced = true;
                if self.needs_node && self.compiler.node().is_none() {
                    self.health.node_is_missing();
                }
            }
            Input::Source(Report::Warnings(origin, warnings), _) => {
                let gone = self.warnings.remove(&origin).unwrap_or_default();
                self.told.change(&WarningChanges { new: warnings.clone(), gone });
                if !warnings.is_empty() {
                    self.warnings.insert(origin, warnings);
                }
            }
            Input::Addresses(addresses) => {
                self.addressed = true;
                self.health.queued_anew();
                self.compiler.set_addresses(addresses);
            }
        }
    }

    /// Rules that know pods by this node's ranges are made with those of its Node object, and made anew if they change.
    fn follow_pod_cidrs(&mut self) -> Result<()> {
        let Some(by) = &mut self.by_pod_cidrs else { return Ok(()) };
        let cidrs = self.compiler.node().map(|node| node.pod_cidrs.clone()).unwrap_or_default();
        if by.known.as_ref() != Some(&cidrs) {
            if cidrs.is_empty() {
                warn!(node = %by.config.node_name, "its Node has no podCIDRs, by which detectLocalMode NodeCIDR would tell pods: nobody is masqueraded on the way to ClusterIPs");
            }
            let rules = by.config.settings.rules_of(by.config.mode, &cidrs);
            self.datapath = open_datapath(&by.config, &rules, &self.health, None)?;
            by.known = Some(cidrs);
            self.anew = true;
            self.pending.merge(Changes::all(self.compiler.table()));
        }
        Ok(())
    }

    /// Compiles and programs what changed.
    fn sync(&mut self, first: bool) -> Result<()> {
        let started = Instant::now();
        let changes = self.compiler.compile();
        self.pending.merge(changes);
        self.told.change(self.compiler.news());
        if self.pending.is_empty() && !first {
            self.health.unchanged();
            return Ok(());
        }
        let table = self.compiler.table();
        let full = first || self.anew;
        let report = self.datapath.apply(table, &self.pending).map_err(anyhow::Error::from)?;
        if let Some(reconciler) = &mut self.reconciler {
            reconciler.note(&self.pending);
        }
        if let Some(resetter) = &mut self.resetter {
            resetter.note(table, &self.pending);
        }
        let changes = std::mem::take(&mut self.pending);
        self.anew = false;
        let elapsed = started.elapsed();
        let refused: BTreeSet<String> = report.refused.iter().map(ToString::to_string).collect();
        for refused in report.refused.iter().filter(|refused| !self.refused.contains(&refused.to_string())) {
            warn!(%refused, "not served; all others are");
            self.notices.send(Notice {
                about: About::Service(refused.service.service.clone()),
                warning: true,
                reason: "NotServed",
                action: "Program",
                note: format!("{} is not served on node {}: {}", refused.service, self.node, refused.reason),
            });
        }
        self.refused = refused;
        info!(
            datapath = self.datapath.name(),
            services = table.services.len(),
            frontends = table.frontends.len(),
            upserts = report.upserts,
            deletes = report.deletes,
            elapsed_us = elapsed.as_micros() as u64,
            "{}",
            self.datapath.done()
        );
        self.health.applied(table, &changes, &report, elapsed, full);
        Ok(())
    }

    /// How long until flows of backends that are gone are to be looked at.
    fn follow_up_in(&self) -> Option<Duration> {
        let reconcile = self.reconciler.as_ref().and_then(Reconciler::due_in);
        let reset = self.resetter.as_ref().and_then(Resetter::due_in);
        reconcile.into_iter().chain(reset).min()
    }

    fn follow_up(&mut self) {
        if let Some(reconciler) = &mut self.reconciler {
            reconciler.run(self.compiler.table(), &self.health);
        }
        if let Some(resetter) = &mut self.resetter {
            resetter.run();
        }
    }

    fn is_retiring(&self) -> bool {
        self.retire.as_ref().is_some_and(Retire::is_pending)
    }

    /// Other modes leave, now that this one serves.
    fn retire_others(&mut self) {
        let Some(retire) = &mut self.retire else { return };
        match retire.step(self.compiler.table()) {
            Ok(left) => self.health.draining(&left),
            Err(error) => {
                warn!(error = %format!("{error:#}"), "what another mode left can't be removed; trying again");
            }
        }
    }
}
