//! Virtual servers, sets and what makes their addresses local; and the rules beside them.

use std::path::Path;

use anyhow::{Context, Result};
use lb_core::{
    rules::{
        iptables::{Config, Translation},
        ipvs::{DEVICE, Link, Scheduler, Servers, State, sets::Set},
    },
    table::{Changes, ServiceTable},
};

use super::{Drift, Listing, iptables::IptablesDrift};
use crate::{datapath::ipvs::exec, scratch::Scratch};

/// The machine's virtual servers and rules, and those that we would make.
pub struct IpvsDrift {
    rules: IptablesDrift,
    servers: Vec<Servers>,
}

impl IpvsDrift {
    /// Finds the programs, and makes the sets that rules to compare with speak of.
    pub fn open(rules: &Config, scheduler: Scheduler, scratch: Scratch) -> Result<Self> {
        let config = Config { translation: Translation::Ipvs, ..rules.clone() };
        let rules = IptablesDrift::open(&config, scratch)?;
        let servers: Vec<Servers> = rules.families().map(|family| Servers::new(family, scheduler)).collect();
        let sets: String = servers
            .iter()
            .flat_map(|servers| Set::ALL.map(|set| format!("{}\n", set.create(servers.family()))))
            .collect();
        rules
            .scratch()
            .within(|| exec::run(&["ipset", "restore"], &sets))
            .context("enter the network namespace of the rules to compare with")??;
        Ok(Self { rules, servers })
    }
}

impl Drift for IpvsDrift {
    fn desired(&mut self, table: &ServiceTable, changes: &Changes) -> Result<Listing> {
        let mut listing = self.rules.desired(table, changes)?;
        for servers in &mut self.servers {
            servers.update(table, changes);
            list(&servers.state(), servers, &mut listing);
        }
        Ok(listing)
    }

    fn actual(&mut self) -> Result<Listing> {
        let mut listing = self.rules.actual()?;
        for servers in &self.servers {
            // ipvsadm would load the module.
            let state = match Path::new("/proc/net/ip_vs").exists() {
                true => exec::actual(servers.family())?,
                false => State::default(),
            };
            list(&state, servers, &mut listing);
        }
        Ok(listing)
    }
}

fn list(state: &State, of: &Servers, listing: &mut Listing) {
    for (addr, server) in &state.servers {
        let object = listing.entry(format!("virtual server {addr}")).or_default();
        object.lines.push(server.options.clone());
        // Those of weight 0 only wait for their last connection.
        let serving = server.destinations.iter().filter(|(_, weight)| **weight > 0);
        object.lines.extend(serving.map(|(to, weight)| format!("destination {to} of weight {weight}")));
    }
    for (set, element) in &state.elements {
        let name = format!("ipset {}", set.name(of.family()));
        listing.entry(name).or_default().lines.push(element.clone());
    }
    for link in &state.links {
        let name = match link {
            Link::Bind(addr) => format!("address {addr} on {DEVICE}"),
            Link::Route(addr) => format!("local route of {addr}"),
            Link::Rule(addr) => format!("ip rule for {addr}"),
        };
        listing.entry(name).or_default();
    }
}

#[cfg(test)]
mod tests {
    use lb_core::{
        compile::{CompileConfig, Compiler, NodeView},
        model::{Event, Family},
        synthetic,
    };

    use super::*;
    use crate::drift::compare;

    #[test]
    fn destinations_that_drain_are_no_difference() {
        let view = NodeView { name: "node-1".into(), ..NodeView::default() };
        let mut compiler = Compiler::new(CompileConfig::default(), view);
        synthetic::cluster(2, 2).for_each(|event| compiler.apply(event));
        let changes = compiler.compile();
        let mut servers = Servers::new(Family::V4, Scheduler::Rr);
        servers.update(compiler.table(), &changes);
        compiler.apply(Event::EndpointSlice(synthetic::slice(0, 1, 0)));
        let changes = compiler.compile();
        servers.update(compiler.table(), &changes);
        assert!(servers.draining() > 0);
        let listed = |servers: &Servers, change: fn(&mut State)| {
            let (mut state, mut listing) = (servers.state(), Listing::new());
            change(&mut state);
            list(&state, servers, &mut listing);
            listing
        };
        let mut fresh = Servers::new(Family::V4, Scheduler::Rr);
        fresh.update(compiler.table(), &Changes::all(compiler.table()));
        let desired = listed(&fresh, |_| {});
        assert_eq!(compare(&desired, &listed(&servers, |_| {})), []);
        let changed = listed(&servers, |state| {
            state.servers.pop_first();
            state.links.pop_last();
            state.elements.pop_first();
        });
        let said: String = compare(&desired, &changed).iter().map(|it| format!("{it}\n")).collect();
        expect_test::expect![[r#"
            missing: address 10.96.0.2 on kube-ipvs0
            missing: ipset KUBE-LOOP-BACK
            missing: virtual server 10.96.0.1:80/TCP
        "#]]
        .assert_eq(&said);
    }
}
