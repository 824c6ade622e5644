//! nftables as `nft list table` prints them: the machine's table, and the same one freshly loaded elsewhere.

use anyhow::{Context, Result};
use lb_core::{
    model::Family,
    rules::{
        iptables::Config,
        nftables::{OWNER, TABLE},
    },
    table::{Changes, ServiceTable},
};

use super::{Drift, Listing};
use crate::{
    datapath::{
        Datapath,
        nftables::{self, NftablesDatapath, nft},
    },
    scratch::Scratch,
};

/// The machine's tables, and a namespace in which ours are kept.
pub struct NftablesDrift {
    datapath: NftablesDatapath,
    scratch: Scratch,
}

impl NftablesDrift {
    /// Finds nft.
    pub fn open(config: &Config, scratch: Scratch) -> Result<Self> {
        Ok(Self { datapath: NftablesDatapath::open(config)?, scratch })
    }
}

impl Drift for NftablesDrift {
    fn desired(&mut self, table: &ServiceTable, changes: &Changes) -> Result<Listing> {
        let datapath = &mut self.datapath;
        let work = || -> Result<Listing> {
            datapath.apply(table, changes)?;
            list()
        };
        self.scratch.within(work).context("enter the network namespace of the tables to compare with")?
    }

    fn actual(&mut self) -> Result<Listing> {
        list()
    }
}

/// The tables of both families, if they are there.
fn list() -> Result<Listing> {
    let mut listing = Listing::new();
    for family in [Family::V4, Family::V6] {
        if nftables::handle(family)?.is_some() {
            let family = nftables::name(family);
            read(family, &nft(&["list", "table", family, TABLE], "")?, &mut listing);
        }
    }
    // A chain that no longer has rules goes with the writer's next transaction.
    listing.retain(|name, object| !object.lines.is_empty() || !name.contains(" chain "));
    Ok(listing)
}

/// Reads one table. Objects are indented by one tab, what they hold by two.
fn read(family: &str, text: &str, listing: &mut Listing) {
    let mut object: Option<(String, bool)> = None;
    let mut elements: Option<String> = None;
    for line in text.lines() {
        if let Some(header) = line.strip_prefix('\t').filter(|rest| !rest.starts_with('\t')) {
            let mut words = header.split(' ');
            let (kind, name) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
            // The owner's chain says whose the table is, and recent sources come and go with the traffic.
            let counts = name != OWNER && !name.starts_with("affinity-");
            object = (header.ends_with('{') && counts)
                .then(|| (format!("{family} {kind} {name}"), kind == "chain"));
            if let Some((name, ordered)) = &object {
                listing.entry(name.clone()).or_default().ordered = *ordered;
            }
            continue;
        }
        let Some((name, _)) = &object else { continue };
        let line = line.trim();
        let Some(entry) = listing.get_mut(name) else { continue };
        match (&mut elements, line.strip_prefix("elements = {")) {
            (Some(text), _) => {
                text.push(' ');
                text.push_str(line);
            }
            (None, Some(rest)) => elements = Some(rest.to_owned()),
            (None, None) if !line.is_empty() => entry.lines.push(sorted(line)),
            (None, None) => {}
        }
        if let Some(text) = elements.take_if(|text| text.trim_end().ends_with('}')) {
            entry.lines.extend(items(text.trim_end().trim_end_matches('}')));
        }
    }
}

/// Items between commas, but for those in quotes.
fn items(text: &str) -> Vec<String> {
    let mut quoted = false;
    let parts = text.split(move |c: char| {
        quoted ^= c == '"';
        c == ',' && !quoted
    });
    parts.map(|part| part.trim().to_owned()).filter(|part| !part.is_empty()).collect()
}

/// A rule with the elements of its set, if it has one, in order: the kernel keeps them in none.
fn sorted(rule: &str) -> String {
    let Some((before, (inside, after))) =
        rule.split_once("{ ").and_then(|(before, rest)| Some((before, rest.split_once(" }")?)))
    else {
        return rule.to_owned();
    };
    let mut elements = items(inside);
    elements.sort();
    format!("{before}{{ {} }}{after}", elements.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_read_as_nft_prints_it() {
        let text = "table ip kube-proxy {\n\tcomment \"rules for kube-proxy\"\n\n\tset cluster-ips {\n\t\ttype ipv4_addr\n\t\telements = { 10.96.0.10, 10.96.0.1,\n\t\t\t     10.96.0.99 }\n\t}\n\n\tset affinity-X {\n\t\ttype ipv4_addr\n\t\telements = { 10.0.0.1 expires 5s }\n\t}\n\n\tmap firewall-ips {\n\t\ttype ipv4_addr . inet_proto . inet_service : verdict\n\t\telements = { 5.6.7.8 . tcp . 80 comment \"ns/a, b\" : goto firewall-x }\n\t}\n\n\tchain services {\n\t\tjump a\n\t\tnumgen random mod 2 vmap { 1 : goto b, 0 : goto a }\n\t}\n\n\tchain lb-agent-owner {\n\t}\n}\n";
        let mut listing = Listing::new();
        read("ip", text, &mut listing);
        let said: String =
            listing.iter().map(|(name, object)| format!("{name}: {:?}\n", object.lines)).collect();
        expect_test::expect![[r#"
            ip chain services: ["jump a", "numgen random mod 2 vmap { 0 : goto a, 1 : goto b }"]
            ip map firewall-ips: ["type ipv4_addr . inet_proto . inet_service : verdict", "5.6.7.8 . tcp . 80 comment \"ns/a, b\" : goto firewall-x"]
            ip set cluster-ips: ["type ipv4_addr", "10.96.0.10", "10.96.0.1", "10.96.0.99"]
        "#]].assert_eq(&said);
    }
}
