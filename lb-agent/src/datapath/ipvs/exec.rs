//! ipvsadm, ipset and ip: what they print of the kernel's state, and how they are given lines to carry out.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr, UdpSocket},
};

use lb_core::{
    model::{Family, Protocol},
    rules::ipvs::{
        DEVICE, Element, Link, Phase, ROUTES, RULE_PRIORITY, Server, State, Transaction, sets::Set,
    },
    table::FrontendAddr,
};
use serde_json::Value;

use crate::datapath::{DatapathError, program};

/// Runs a program and returns what it prints.
pub fn output(command: &[&str]) -> Result<String, DatapathError> {
    run(command, "")
}

/// Runs a program on lines of input. Whatever it complains of is an error, though it may exit with 0 as ipvsadm does.
pub fn run(command: &[&str], input: &str) -> Result<String, DatapathError> {
    let (name, args) = command.split_first().expect("a command has a name");
    let output = program::feed(name, args, input)?;
    match output.status.success() && output.stderr.trim_ascii().is_empty() {
        true => Ok(program::printed(&output)),
        false => Err(program::failed(name, args, program::complaint(&output))),
    }
}

fn failed(command: &[&str], source: String) -> DatapathError {
    program::failed(command[0], &command[1..], source)
}

/// Carries a transaction out. After an error the kernel's state is not known, but all other servers and destinations are
/// there if it is about some that the kernel refuses.
pub fn carry_out(transaction: &Transaction) -> Result<(), DatapathError> {
    let mut refused = Ok(());
    for (phase, lines) in transaction.phases() {
        let input: String = lines.iter().map(|line| line.text(source_towards) + "\n").collect();
        match run(phase.program(transaction.family()), &input) {
            // ipvsadm goes on to the next line, and so do we.
            Err(error) if phase == Phase::AddServers => refused = Err(error),
            done => drop(done?),
        }
    }
    refused
}

/// The address that this node sends from towards another; no packet is sent. Ports of services have routes of their
/// own, the discard port (RFC 863) stands for all others.
fn source_towards(addr: IpAddr) -> Option<IpAddr> {
    let any: SocketAddr = if addr.is_ipv4() { ([0; 4], 0).into() } else { ([0u16; 8], 0).into() };
    let socket = UdpSocket::bind(any).ok()?;
    socket.connect((addr, 9)).ok()?;
    socket.local_addr().ok().map(|local| local.ip())
}

/// What is in the kernel of one family, as far as kube-proxy or our agent put it there: the sets name it.
pub fn actual(family: Family) -> Result<State, DatapathError> {
    let elements = elements(family, &output(&["ipset", "save"])?);
    let mut servers = servers(family, &output(&["ipvsadm", "-Sn"])?);
    servers.retain(|addr, _| names_server(&elements, addr));
    Ok(State { servers, elements, links: links(family)? })
}

/// An element leads to this virtual server.
fn names_server(elements: &BTreeSet<Element>, addr: &FrontendAddr) -> bool {
    let (protocol, node_ports) = match addr.protocol {
        Protocol::Tcp => ("tcp", Set::NodePortTcp),
        Protocol::Udp => ("udp", Set::NodePortUdp),
        Protocol::Sctp => ("sctp", Set::NodePortSctp),
    };
    let dialled = format!("{},{protocol}:{}", addr.addr, addr.port);
    let by_address =
        [Set::ClusterIp, Set::ExternalIp, Set::ExternalIpLocal, Set::LoadBalancer, Set::NodePortSctp];
    by_address.into_iter().any(|set| elements.contains(&(set, dialled.clone())))
        || elements.contains(&(node_ports, addr.port.to_string()))
}

/// What `ipset save` prints.
fn elements(family: Family, text: &str) -> BTreeSet<Element> {
    let element = |line: &str| {
        let (name, element) = line.strip_prefix("add ")?.split_once(' ')?;
        Some((Set::by_name(family, name)?, element.to_owned()))
    };
    text.lines().filter_map(element).collect()
}

/// What `ipvsadm -Sn` prints: lines as it takes them.
fn servers(family: Family, text: &str) -> BTreeMap<FrontendAddr, Server> {
    let mut servers: BTreeMap<FrontendAddr, Server> = BTreeMap::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [verb, protocol, addr, options @ ..] = words.as_slice() else { continue };
        let Some(addr) = frontend(protocol, addr).filter(|addr| Family::of(addr.addr) == family) else {
            continue;
        };
        let server = servers.entry(addr).or_default();
        match (*verb, options) {
            ("-A", options) => server.options = options.join(" "),
            ("-a", ["-r", destination, _, "-w", weight, ..]) => {
                if let (Ok(destination), Ok(weight)) = (destination.parse(), weight.parse()) {
                    server.destinations.insert(destination, weight);
                }
            }
            _ => {}
        }
    }
    servers
}

fn frontend(protocol: &str, addr: &str) -> Option<FrontendAddr> {
    let protocol = match protocol {
        "-t" => Protocol::Tcp,
        "-u" => Protocol::Udp,
        "--sctp-service" => Protocol::Sctp,
        _ => return None,
    };
    let addr: SocketAddr = addr.parse().ok()?;
    Some(FrontendAddr { addr: addr.ip(), port: addr.port(), protocol })
}

/// Addresses of the dummy device, and rules and routes of the table that is ours.
fn links(family: Family) -> Result<BTreeSet<Link>, DatapathError> {
    let (ip, length) = match family {
        Family::V4 => ("-4", 32),
        Family::V6 => ("-6", 128),
    };
    let mut links = BTreeSet::new();
    if device()?.is_some() {
        for device in json(&["ip", ip, "-j", "addr", "show", "dev", DEVICE])? {
            for addr in device["addr_info"].as_array().into_iter().flatten() {
                let is_vip = addr["prefixlen"] == length && addr["scope"] == "global";
                links.extend(address(&addr["local"]).filter(|_| is_vip).map(Link::Bind));
            }
        }
    }
    for rule in json(&["ip", ip, "-j", "rule", "show", "pref", &RULE_PRIORITY.to_string()])? {
        let protocol = match rule["ipproto"].as_str() {
            Some("tcp") => Protocol::Tcp,
            Some("udp") => Protocol::Udp,
            Some("sctp") => Protocol::Sctp,
            _ => continue,
        };
        let port = rule["dport"].as_u64().and_then(|port| u16::try_from(port).ok());
        let ours = rule["table"].as_str().and_then(|table| table.parse().ok()) == Some(ROUTES);
        if let (Some(addr), Some(port), true) = (address(&rule["dst"]), port, ours) {
            links.insert(Link::Rule(FrontendAddr { addr, port, protocol }));
        }
    }
    // iproute2 calls a table without routes an error.
    let routes = ["ip", ip, "-j", "route", "show", "table", &ROUTES.to_string()];
    for route in json(&routes).unwrap_or_default() {
        if route["dev"] == "lo" && route["type"] == "local" {
            links.extend(address(&route["dst"]).map(Link::Route));
        }
    }
    Ok(links)
}

fn address(value: &Value) -> Option<IpAddr> {
    value.as_str()?.parse().ok()
}

fn json(command: &[&str]) -> Result<Vec<Value>, DatapathError> {
    let text = output(command)?;
    if text.trim().is_empty() {
        return Ok(Vec::new());
    }
    serde_json::from_str(&text).map_err(|error| failed(command, error.to_string()))
}

/// The dummy device: whether it is there, and its alias.
pub fn device() -> Result<Option<String>, DatapathError> {
    let devices = json(&["ip", "-j", "link", "show", "type", "dummy"])?;
    let device = devices.iter().find(|device| device["ifname"] == DEVICE);
    Ok(device.map(|device| device["ifalias"].as_str().unwrap_or_default().to_owned()))
}

/// Connections of destinations, active and inactive, as `/proc/net/ip_vs` counts them (kernel
/// `net/netfilter/ipvs/ip_vs_ctl.c` `ip_vs_info_seq_show`).
pub fn connections(text: &str) -> BTreeMap<(FrontendAddr, SocketAddr), u64> {
    let mut connections = BTreeMap::new();
    let mut server = None;
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["->", destination, _, _, active, inactive, ..] => {
                let counts = (active.parse::<u64>(), inactive.parse::<u64>());
                if let (Some(server), Some(destination), (Ok(active), Ok(inactive))) =
                    (server, hex_address(destination), counts)
                {
                    connections.insert((server, destination), active + inactive);
                }
            }
            [protocol, addr, ..] => {
                let protocol = match *protocol {
                    "TCP" => Some(Protocol::Tcp),
                    "UDP" => Some(Protocol::Udp),
                    "SCTP" => Some(Protocol::Sctp),
                    _ => None,
                };
                server = protocol.zip(hex_address(addr)).map(|(protocol, addr)| FrontendAddr {
                    addr: addr.ip(),
                    port: addr.port(),
                    protocol,
                });
            }
            _ => server = None,
        }
    }
    connections
}

/// `0A60000A:0050`, or `[fd00:…:0001]:0050`.
fn hex_address(text: &str) -> Option<SocketAddr> {
    let (addr, port) = text.rsplit_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let addr = match addr.strip_prefix('[') {
        Some(addr) => addr.strip_suffix(']')?.parse().ok()?,
        None => IpAddr::from(u32::from_str_radix(addr, 16).ok()?.to_be_bytes()),
    };
    Some(SocketAddr::new(addr, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ipvsadm_prints_is_read() {
        let text = "-A -t 10.96.0.10:80 -s rr -p 60\n-a -t 10.96.0.10:80 -r 10.244.1.2:8080 -m -w 1\n\
                    -A -u 10.96.0.10:53 -s rr\n-A --sctp-service 10.96.0.10:53 -s rr\n-A -f 7 -s rr\n\
                    -A -t [fd00::1]:80 -s mh -b mh-port\n-a -t [fd00::1]:80 -r [fd00:1::2]:8080 -m -w 0\n";
        let shown = |family| -> Vec<String> {
            let shown = servers(family, text).into_iter();
            shown.map(|(addr, s)| format!("{addr} {} {:?}", s.options, s.destinations)).collect()
        };
        assert_eq!(
            shown(Family::V4),
            [
                "10.96.0.10:53/UDP -s rr {}",
                "10.96.0.10:53/SCTP -s rr {}",
                "10.96.0.10:80/TCP -s rr -p 60 {10.244.1.2:8080: 1}"
            ]
        );
        assert_eq!(shown(Family::V6), ["[fd00::1]:80/TCP -s mh -b mh-port {[fd00:1::2]:8080: 0}"]);
    }

    #[test]
    fn only_servers_that_a_set_names_are_ours() {
        let text = "create KUBE-CLUSTER-IP hash:ip,port family inet\nadd KUBE-CLUSTER-IP 10.96.0.10,tcp:80\n\
                    add KUBE-NODE-PORT-UDP 30053\nadd KUBE-6-CLUSTER-IP fd00::1,tcp:80\nadd OTHER 1.2.3.4,tcp:5\n";
        let elements = elements(Family::V4, text);
        assert_eq!(elements.len(), 2);
        let names = |protocol: &str, addr: &str| {
            names_server(&elements, &frontend(protocol, addr).expect("a frontend"))
        };
        assert!(names("-t", "10.96.0.10:80") && names("-u", "192.0.2.1:30053"));
        assert!(
            !names("-u", "10.96.0.10:80") && !names("-t", "192.0.2.1:30053") && !names("-t", "1.2.3.4:5")
        );
    }

    #[test]
    fn connections_are_counted_per_destination() {
        let text = "IP Virtual Server version 1.2.1 (size=4096)\nProt LocalAddress:Port Scheduler Flags\n  -> RemoteAddress:Port Forward Weight ActiveConn InActConn\n\
                    TCP  0A60000A:0050 rr  persistent 15000 FFFFFFFF\n  -> 0AF40103:1F90      Masq    0      2          3         \n\
                    TCP  [fd00:0000:0000:0000:0000:0000:0000:0001]:0050 mh \n  -> [fd00:0001:0000:0000:0000:0000:0000:0002]:1F90      Masq    0      0          0         \n";
        let shown: Vec<String> = connections(text).iter().map(|((s, d), n)| format!("{s} {d} {n}")).collect();
        assert_eq!(shown, ["10.96.0.10:80/TCP 10.244.1.3:8080 5", "[fd00::1]:80/TCP [fd00:1::2]:8080 0"]);
    }
}
