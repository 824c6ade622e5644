//! iptables rules as `iptables-save` prints them: the machine's, and the same ones freshly loaded elsewhere.

use anyhow::{Context, Result};
use lb_core::{
    model::Family,
    rules::{iptables::Config, names},
    table::{Changes, ServiceTable},
};

use super::{Drift, Listing};
use crate::{
    datapath::{
        Datapath,
        iptables::{
            IptablesDatapath,
            exec::{Programs, is_ours},
        },
    },
    scratch::Scratch,
};

/// The machine's rules, and a namespace in which ours are kept.
pub struct IptablesDrift {
    datapath: IptablesDatapath,
    scratch: Scratch,
}

impl IptablesDrift {
    /// Finds the programs that the machine's rules are in.
    pub fn open(config: &Config, scratch: Scratch) -> Result<Self> {
        let mut datapath = IptablesDatapath::find(config.clone())?;
        scratch
            .within(|| datapath.count())
            .context("enter the network namespace of the rules to compare with")?;
        Ok(Self { datapath, scratch })
    }

    /// The families that have rules here.
    pub fn families(&self) -> impl Iterator<Item = Family> {
        self.datapath.families()
    }

    /// Where the rules to compare with are.
    pub fn scratch(&self) -> &Scratch {
        &self.scratch
    }
}

impl Drift for IptablesDrift {
    fn desired(&mut self, table: &ServiceTable, changes: &Changes) -> Result<Listing> {
        let datapath = &mut self.datapath;
        let work = || -> Result<Listing> {
            datapath.apply(table, changes)?;
            list(&datapath.programs())
        };
        self.scratch.within(work).context("enter the network namespace of the rules to compare with")?
    }

    fn actual(&mut self) -> Result<Listing> {
        list(&self.datapath.programs())
    }
}

/// What the programs list of the chains that kube-proxy and we write, and of the ways to them.
fn list(programs: &[Programs]) -> Result<Listing> {
    let mut listing = Listing::new();
    for programs in programs {
        read(&programs.name(), &programs.save(None)?, &mut listing);
    }
    Ok(listing)
}

fn read(program: &str, text: &str, listing: &mut Listing) {
    let mut table = "";
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('*') {
            table = name;
        }
        let name = |chain: &str| format!("{program} -t {table} chain {chain}");
        if let Some(chain) = line.strip_prefix(':').and_then(|rest| rest.split(' ').next()) {
            // It says whose the rules are, not what they are.
            if is_ours(chain) && chain != names::OWNER {
                listing.entry(name(chain)).or_default().ordered = !names::SHARED.contains(&chain);
            }
        }
        let Some((chain, rule)) = line.strip_prefix("-A ").and_then(|rest| rest.split_once(' ')) else {
            continue;
        };
        let target = rule.split("-j ").nth(1).and_then(|rest| rest.split(' ').next());
        if is_ours(chain) || target.is_some_and(is_ours) {
            listing.entry(name(chain)).or_default().lines.push(rule.to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_chains_and_the_ways_to_them_are_listed_and_no_others() {
        let text = "# Generated\n*mangle\n:LB-AGENT-OWNER - [0:0]\nCOMMIT\n*nat\n:PREROUTING ACCEPT [5:300]\n:KUBE-SERVICES - [0:0]\n:KUBE-SVC-X - [0:0]\n:CALICO - [0:0]\n\
                    -A PREROUTING -j CALICO\n-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
                    -A KUBE-SERVICES -d 10.96.0.1/32 -j KUBE-SVC-X\n-A KUBE-SVC-X -j ACCEPT\n-A CALICO -j ACCEPT\nCOMMIT\n";
        let mut listing = Listing::new();
        read("iptables-nft", text, &mut listing);
        let said: Vec<String> =
            listing.iter().map(|(name, object)| format!("{name}: {:?}", object.lines)).collect();
        assert_eq!(
            said,
            [
                r#"iptables-nft -t nat chain KUBE-SERVICES: ["-d 10.96.0.1/32 -j KUBE-SVC-X"]"#,
                r#"iptables-nft -t nat chain KUBE-SVC-X: ["-j ACCEPT"]"#,
                r#"iptables-nft -t nat chain PREROUTING: ["-m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES"]"#,
            ]
        );
        let ordered: Vec<bool> = listing.values().map(|object| object.ordered).collect();
        assert_eq!(ordered, [false, true, false], "service ports exclude each other in shared chains");
    }
}
