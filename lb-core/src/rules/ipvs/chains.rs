//! netfilter's part of the IPVS mode: who is masqueraded, which sources may use a load balancer, and that nothing but
//! services answers on a VIP (kube-proxy 1.36 `pkg/proxy/ipvs/proxier.go` `writeIptablesRules`).
//!
//! The rules speak of sets; they are the same whatever is served. kube-proxy leaves out rules of empty sets, here they
//! stand always.

use std::collections::BTreeMap;

use super::sets::Set;
use crate::{
    model::{Family, Protocol},
    rules::{
        Match, Net, Rule, Target,
        facts::Facts,
        iptables::{Chain, Config, ServiceRules, Table, from_others},
        names,
    },
    table::FrontendKind,
};

/// All chains with their rules.
pub fn base(family: Family, config: &Config) -> BTreeMap<Chain, Vec<Rule>> {
    let writer = Writer { family, config };
    let mut chains: BTreeMap<Chain, Vec<Rule>> = BTreeMap::new();
    let mut chain = |table: Table, name: &str, rules: Vec<Rule>| chains.insert((table, name.into()), rules);
    for table in Table::ALL {
        chain(table, names::CANARY, Vec::new());
    }
    chain(Table::Mangle, names::OWNER, Vec::new());
    chain(Table::Nat, names::SERVICES, writer.services());
    chain(Table::Nat, names::LOAD_BALANCER, writer.load_balancer());
    chain(Table::Nat, names::NODE_PORT, writer.node_port());
    chain(Table::Nat, names::MARK_MASQ, vec![rule(Vec::new(), Target::MarkOr(config.masquerade_mark))]);
    chain(Table::Nat, names::POSTROUTING, writer.postrouting());
    chain(Table::Filter, names::FORWARD, writer.forward());
    chain(Table::Filter, names::NODE_PORT, writer.health_checks());
    chain(Table::Filter, names::PROXY_FIREWALL, writer.proxy_firewall());
    chain(Table::Filter, names::SOURCE_RANGES_FIREWALL, writer.source_ranges());
    chain(Table::Filter, names::IPVS_FILTER, writer.ipvs_filter());
    chain(Table::Filter, names::IPVS_OUT_FILTER, Vec::new());
    chains
}

/// Where the kernel's chains call ours: table, calling chain, rule.
pub fn jumps() -> Vec<(Table, &'static str, Rule)> {
    let jump = |table, from: &'static str, to: &str, text: &str| {
        let target = Target::Jump(to.into());
        (table, from, rule(vec![Match::Comment(text.into())], target))
    };
    let (portals, firewall) = ("kubernetes service portals", "kube-proxy firewall rules");
    let filter = "kubernetes ipvs access filter";
    vec![
        jump(Table::Nat, "OUTPUT", names::SERVICES, portals),
        jump(Table::Nat, "PREROUTING", names::SERVICES, portals),
        jump(Table::Nat, "POSTROUTING", names::POSTROUTING, "kubernetes postrouting rules"),
        jump(Table::Filter, "FORWARD", names::FORWARD, "kubernetes forwarding rules"),
        jump(Table::Filter, "INPUT", names::NODE_PORT, "kubernetes health check rules"),
        jump(Table::Filter, "INPUT", names::PROXY_FIREWALL, firewall),
        jump(Table::Filter, "FORWARD", names::PROXY_FIREWALL, firewall),
        jump(Table::Filter, "INPUT", names::IPVS_FILTER, filter),
        jump(Table::Filter, "OUTPUT", names::IPVS_OUT_FILTER, filter),
    ]
}

/// The rules of one service port: this node is no allowed source of its load-balancer IPs. kube-proxy looks for the
/// address itself as the source, as the node's own connection to an address that is bound here has it; but addresses of
/// nodes aren't bound.
pub(in crate::rules) fn of_service(port: &Facts<'_>) -> ServiceRules {
    let mut rules = ServiceRules::default();
    for (addr, frontend) in port.of_kind(FrontendKind::LoadBalancer) {
        if frontend.source_ranges.is_empty() || frontend.source_ranges_allow_host {
            continue;
        }
        let matches = vec![Match::SrcLocal, Match::VirtualServer(*addr)];
        let drop = rule(matches, Target::Drop);
        rules.shared.push((Table::Filter, names::IPVS_OUT_FILTER, drop));
    }
    rules
}

fn rule(matches: Vec<Match>, target: Target) -> Rule {
    Rule { matches, target: Some(target) }
}

struct Writer<'a> {
    family: Family,
    config: &'a Config,
}

impl Writer<'_> {
    fn in_set(&self, set: Set) -> Match {
        Match::InSet(set.name(self.family).into(), set.directions())
    }

    fn commented(&self, set: Set) -> Vec<Match> {
        vec![Match::Comment(set.comment().into()), self.in_set(set)]
    }

    fn services(&self) -> Vec<Rule> {
        let loopback = match self.family {
            Family::V4 => "127.0.0.0/8",
            Family::V6 => "::1/128",
        };
        let loopback = Match::Src(Net::Range(loopback.parse().expect("a network")));
        let mark = || Target::Jump(names::MARK_MASQ.into());
        let mut rules = vec![
            rule(vec![loopback], Target::Return),
            rule(self.commented(Set::LoadBalancer), Target::Jump(names::LOAD_BALANCER.into())),
            rule(self.cluster_ips_to_mark(), mark()),
            rule(self.commented(Set::ExternalIp), mark()),
        ];
        rules.extend(self.accept_external_ips(Set::ExternalIp));
        // kube-proxy doesn't mark these. But a node that dials such an address sends from it, as it is bound here:
        // an endpoint elsewhere would answer to its own node.
        let own = [self.commented(Set::ExternalIpLocal), vec![Match::SrcLocal]].concat();
        rules.push(rule(own, mark()));
        rules.extend(self.accept_external_ips(Set::ExternalIpLocal));
        rules.push(rule(vec![Match::DstLocal], Target::Jump(names::NODE_PORT.into())));
        for set in [Set::ClusterIp, Set::LoadBalancer] {
            rules.push(rule(vec![self.in_set(set)], Target::Accept));
        }
        rules
    }

    /// Who is masqueraded on the way to a ClusterIP: all, or who is no pod, or, if pods can't be told, this node, which
    /// takes the VIP as its source.
    fn cluster_ips_to_mark(&self) -> Vec<Match> {
        let mut matches = self.commented(Set::ClusterIp);
        match from_others(&self.config.pods, self.family) {
            _ if self.config.masquerade_all => {}
            Some(from_others) => matches.push(from_others),
            None => {
                matches.pop();
                matches.push(Match::InSet(Set::ClusterIp.name(self.family).into(), "src,dst"));
            }
        }
        matches
    }

    /// From outside the machine, or to an address that is local here.
    fn accept_external_ips(&self, set: Set) -> [Rule; 2] {
        let with = |more: &[Match]| [&self.commented(set), more].concat();
        [
            rule(with(&[Match::NotFromBridgePort, Match::SrcNotLocal]), Target::Accept),
            rule(with(&[Match::DstLocal]), Target::Accept),
        ]
    }

    fn load_balancer(&self) -> Vec<Rule> {
        let mark = || Target::Jump(names::MARK_MASQ.into());
        let own = [self.commented(Set::LoadBalancerLocal), vec![Match::SrcLocal]].concat();
        vec![
            // As for externalIPs of policy Local.
            rule(own, mark()),
            rule(self.commented(Set::LoadBalancerLocal), Target::Return),
            rule(Vec::new(), mark()),
        ]
    }

    fn node_port(&self) -> Vec<Rule> {
        let mut rules = Vec::new();
        for (protocol, local, all) in [
            (Protocol::Tcp, Set::NodePortLocalTcp, Set::NodePortTcp),
            (Protocol::Udp, Set::NodePortLocalUdp, Set::NodePortUdp),
            (Protocol::Sctp, Set::NodePortLocalSctp, Set::NodePortSctp),
        ] {
            let matches = |set| [vec![Match::Protocol(protocol)], self.commented(set)].concat();
            rules.push(rule(matches(local), Target::Return));
            rules.push(rule(matches(all), Target::Jump(names::MARK_MASQ.into())));
        }
        rules
    }

    fn postrouting(&self) -> Vec<Rule> {
        let mark = self.config.masquerade_mark;
        let comment = Match::Comment("kubernetes service traffic requiring SNAT".into());
        let masquerade = || Target::Masquerade { random: self.config.random_fully };
        vec![
            rule(self.commented(Set::LoopBack), Target::Masquerade { random: false }),
            rule(vec![Match::NotMark(mark, mark)], Target::Return),
            rule(Vec::new(), Target::MarkXor(mark)),
            rule(vec![comment], masquerade()),
        ]
    }

    fn forward(&self) -> Vec<Rule> {
        let mark = self.config.masquerade_mark;
        let comment = |text: &str| Match::Comment(text.into());
        vec![
            rule(vec![comment("kubernetes forwarding rules"), Match::Mark(mark, mark)], Target::Accept),
            rule(
                vec![comment("kubernetes forwarding conntrack rule"), Match::CtState("RELATED,ESTABLISHED")],
                Target::Accept,
            ),
        ]
    }

    fn health_checks(&self) -> Vec<Rule> {
        vec![rule(self.commented(Set::HealthCheckNodePort), Target::Accept)]
    }

    fn proxy_firewall(&self) -> Vec<Rule> {
        let target = Target::Jump(names::SOURCE_RANGES_FIREWALL.into());
        vec![rule(self.commented(Set::LoadBalancerFirewall), target)]
    }

    fn source_ranges(&self) -> Vec<Rule> {
        let mut rules: Vec<Rule> = [Set::LoadBalancerSourceCidr, Set::LoadBalancerSourceIp]
            .map(|set| rule(self.commented(set), Target::Return))
            .into();
        rules.push(rule(Vec::new(), Target::Drop));
        rules
    }

    /// Nothing but services answers on addresses that are bound here.
    fn ipvs_filter(&self) -> Vec<Rule> {
        let served = [
            Set::LoadBalancer,
            Set::ClusterIp,
            Set::ExternalIp,
            Set::ExternalIpLocal,
            Set::HealthCheckNodePort,
        ];
        let mut rules: Vec<Rule> = served.map(|set| rule(vec![self.in_set(set)], Target::Return)).into();
        let bound = vec![Match::CtState("NEW"), self.in_set(Set::Bound)];
        rules.push(rule(bound, Target::Reject));
        rules
    }
}
