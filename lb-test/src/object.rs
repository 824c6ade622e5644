//! The shipped programs under `BPF_PROG_TEST_RUN`, on a node of their own: its maps are filled by the real datapath.

use std::{
    collections::BTreeMap,
    fs::File,
    net::{IpAddr, SocketAddr},
    os::fd::AsRawFd,
};

use anyhow::{Context, Result, bail};
use aya::programs::{Program, TestRun, TestRunOptions};
use lb_agent::datapath::{
    Datapath,
    ebpf::{
        apply::EbpfDatapath,
        load::{Generation, Loader, Programs},
        maps::{NodeMaps, Pins, metrics},
        sizes::Capacity,
    },
};
use lb_common::{
    abi::{DeviceValue, NodeConfig, device_flags},
    outcome::{Hook, Outcome},
};
use lb_core::{
    compile::{CompileConfig, Compiler, NodeView},
    model::Event,
    table::Changes,
};

use crate::{netns::Lab, packet::Mac};

/// The node's own Ethernet address.
pub const NODE_MAC: Mac = [2, 0, 0, 0, 0, 0x11];
/// The client's.
pub const CLIENT_MAC: Mac = [2, 0, 0, 0, 0, 0x09];
/// The other node's.
pub const OTHER_MAC: Mac = [2, 0, 0, 0, 0, 0x12];

/// A program that can be run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Run {
    /// `lb_xdp`.
    Xdp,
    /// `lb_netdev_in`.
    NetdevIn,
    /// `lb_netdev_out`.
    NetdevOut,
    /// `lb_pod_in`.
    PodIn,
    /// `lb_pod_out`.
    PodOut,
}

/// `XDP_DROP`, `XDP_PASS`, `XDP_TX`.
pub const XDP: (u32, u32, u32) = (1, 2, 3);
/// `TCX_NEXT`, `TC_ACT_SHOT`, `TC_ACT_REDIRECT`.
pub const TC: (u32, u32, u32) = (u32::MAX, 2, 7);

impl Run {
    fn program(self) -> &'static str {
        match self {
            Self::Xdp => "lb_xdp",
            Self::NetdevIn => "lb_netdev_in",
            Self::NetdevOut => "lb_netdev_out",
            Self::PodIn => "lb_pod_in",
            Self::PodOut => "lb_pod_out",
        }
    }

    /// Where it counts.
    pub fn hook(self) -> Hook {
        match self {
            Self::Xdp => Hook::Xdp,
            Self::NetdevIn => Hook::NetdevIngress,
            Self::NetdevOut => Hook::NetdevEgress,
            Self::PodIn => Hook::PodIngress,
            Self::PodOut => Hook::PodEgress,
        }
    }

    /// Verdicts: drop, pass, send.
    pub fn verdicts(self) -> (u32, u32, u32) {
        match self {
            Self::Xdp => XDP,
            _ => (TC.1, TC.0, TC.2),
        }
    }
}

/// One run's end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ran {
    /// The program's verdict.
    pub verdict: u32,
    /// The frame after it.
    pub frame: Vec<u8>,
    /// Counters that moved.
    pub counted: Vec<(Hook, Outcome, u64)>,
}

/// Room for the largest cluster of the benchmarks.
const CAPACITY: Capacity =
    Capacity { slots: 1 << 20, backends: [1 << 18; 2], frontends: [1 << 16; 2], source_ranges: [1 << 14; 2] };

/// A node with the programs loaded and nothing attached.
pub struct Node {
    _lab: Lab,
    pins: Pins,
    programs: Programs,
    datapath: EbpfDatapath,
    compiler: Compiler,
    maps: NodeMaps,
    eth0: u32,
}

impl Node {
    /// Makes a namespace with a device, neighbours and routes, and moves this thread into it.
    pub fn new() -> Result<Self> {
        let mut lab = Lab::new()?;
        lab.add_ns("node")?;
        lab.add_ns("lan")?;
        lab.veth(("node", "eth0"), ("lan", "peer"))?;
        lab.sysctl("node", "net.ipv4.ip_forward", "1")?;
        lab.sysctl("node", "net.ipv6.conf.all.forwarding", "1")?;
        for words in [
            "link set eth0 address 02:00:00:00:00:11",
            "addr add 192.0.2.11/24 dev eth0",
            "addr add 2001:db8::11/64 dev eth0 nodad",
            "route add default via 192.0.2.9",
            "-6 route add default via 2001:db8::9",
            "route add 10.244.2.0/24 via 192.0.2.12",
            "-6 route add fd00:10:244:2::/64 via 2001:db8::12",
            "neigh replace 192.0.2.9 lladdr 02:00:00:00:00:09 dev eth0 nud permanent",
            "neigh replace 192.0.2.12 lladdr 02:00:00:00:00:12 dev eth0 nud permanent",
            "neigh replace 2001:db8::9 lladdr 02:00:00:00:00:09 dev eth0 nud permanent",
            "neigh replace 2001:db8::12 lladdr 02:00:00:00:00:12 dev eth0 nud permanent",
        ] {
            lab.ip("node", words)?;
        }
        let ns = File::open(format!("/run/netns/{}", lab.ns("node"))).context("open the namespace")?;
        // SAFETY: moves this thread alone, into a namespace that lives as long as the lab.
        if unsafe { libc::setns(ns.as_raw_fd(), libc::CLONE_NEWNET) } != 0 {
            bail!("enter the namespace: {}", std::io::Error::last_os_error());
        }
        // SAFETY: a NUL-terminated name.
        let eth0 = unsafe { libc::if_nametoindex(c"eth0".as_ptr()) };
        let pins = Pins::new(&lab.bpf_root("node"));
        let programs = Loader::new(&pins, 262_144).load(CAPACITY, Generation::Present)?;
        let datapath = EbpfDatapath::open(&pins)?;
        let mut maps = NodeMaps::open(&pins)?;
        let addr4 = [192, 0, 2, 11];
        let addr6 = "2001:db8::11".parse::<std::net::Ipv6Addr>()?.octets();
        maps.set_devices(&[(eth0, DeviceValue { flags: device_flags::XDP_TARGET, addr4, addr6 })])?;
        let view = NodeView {
            name: "node-1".into(),
            addresses: vec![IpAddr::from(addr4), IpAddr::from(addr6)],
            ..NodeView::default()
        };
        let config = CompileConfig { localhost_node_ports: false, ..CompileConfig::default() };
        let mut node =
            Self { _lab: lab, pins, programs, datapath, compiler: Compiler::new(config, view), maps, eth0 };
        node.snat_ports(1024, 28976)?;
        Ok(node)
    }

    /// Sets the ports for masqueraded flows.
    pub fn snat_ports(&mut self, first: u16, count: u16) -> Result<()> {
        let node = NodeConfig {
            routing_generation: 1,
            snat_port_first: first,
            snat_port_count: count,
            addr4: [192, 0, 2, 11],
            addr6: "2001:db8::11".parse::<std::net::Ipv6Addr>()?.octets(),
            ..NodeConfig::default()
        };
        Ok(self.maps.set_node(node)?)
    }

    /// Takes events in and programs what follows; returns the changes, and the map writes they took.
    pub fn apply(&mut self, events: impl IntoIterator<Item = Event>) -> Result<(Changes, usize)> {
        events.into_iter().for_each(|event| self.compiler.apply(event));
        let changes = self.compiler.compile();
        let report = self.datapath.apply(self.compiler.table(), &changes)?;
        Ok((changes, report.upserts + report.deletes))
    }

    /// The device's index.
    pub fn eth0(&self) -> u32 {
        self.eth0
    }

    /// Where its maps are pinned.
    pub fn pins(&self) -> &Pins {
        &self.pins
    }

    /// A loaded program.
    pub fn program(&mut self, name: &str) -> Result<&mut Program> {
        let objects = self.programs.objects();
        let program = objects.into_iter().find_map(|(_, ebpf)| ebpf.program_mut(name));
        program.with_context(|| format!("no program {name}"))
    }

    /// Runs a program on a frame.
    pub fn run(&mut self, run: Run, frame: &[u8]) -> Result<Ran> {
        let before = self.counters()?;
        let mut out = vec![0; 4096];
        let context = match run {
            // struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
            Run::Xdp => words(&[0, frame.len() as u32, 0, self.eth0, 0, 0]),
            // struct __sk_buff: ifindex is its eleventh word.
            _ => {
                let mut context = [0; 48];
                context[10] = self.eth0;
                words(&context)
            }
        };
        let mut options = TestRunOptions::new();
        options.data_in = Some(frame);
        options.data_out = Some(&mut out);
        options.ctx_in = Some(&context);
        let result = match self.program(run.program())? {
            Program::Xdp(program) => program.test_run(options),
            Program::SchedClassifier(program) => program.test_run(options),
            _ => bail!("{run:?} can't be run"),
        };
        let result = result.with_context(|| format!("run {run:?} on {} bytes", frame.len()))?;
        out.truncate(result.data_size_out as usize);
        let mut counted = Vec::new();
        for ((hook, outcome), count) in self.counters()? {
            let moved = count - before.get(&(hook, outcome)).copied().unwrap_or(0);
            if moved > 0 {
                counted.push((hook, outcome, moved));
            }
        }
        Ok(Ran { verdict: result.return_value, frame: out, counted })
    }

    fn counters(&self) -> Result<BTreeMap<(Hook, Outcome), u64>> {
        Ok(metrics(&self.pins)?.into_iter().map(|(hook, outcome, count)| ((hook, outcome), count)).collect())
    }
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// The source of a frame, wherever its network header ends.
pub fn source_of(frame: &[u8]) -> SocketAddr {
    let port = |at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
    if frame[12] == 8 {
        let header = usize::from(frame[14] & 15) * 4;
        let addr: [u8; 4] = frame[26..30].try_into().expect("four bytes");
        SocketAddr::new(addr.into(), port(14 + header))
    } else {
        let addr: [u8; 16] = frame[22..38].try_into().expect("sixteen bytes");
        SocketAddr::new(addr.into(), port(54))
    }
}
