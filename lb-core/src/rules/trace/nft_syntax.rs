//! The part of nft's language that we write, and no more: whatever else stands in a line is an error.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use ipnet::IpNet;

use super::TraceError;
use crate::{
    model::{Family, Protocol},
    rules::names,
};

/// A part of a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Statement {
    /// The rule goes on if this holds.
    Is(Test),
    /// The rule goes on if the source is in a set that rules fill.
    RecentSource,
    /// Puts the source into such a set.
    RememberSource,
    /// Changes the mark.
    Mark(MarkChange),
    /// A verdict by destination (or not), protocol and port.
    Lookup { with_addr: bool, map: String },
    /// One of these at random.
    Choose(Vec<Verdict>),
    /// Rewrites the source.
    Masquerade,
    /// Rewrites the destination.
    Dnat(SocketAddr),
    /// What becomes of the packet.
    Verdict(Verdict),
}

/// A condition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Test {
    DstInSet(String),
    Dst(IpNet),
    SrcIn(Vec<IpNet>),
    SrcNotIn(Vec<IpNet>),
    SrcLocal,
    /// By the device it came in from: rules ask for pods' devices only.
    FromPod,
    NotFromPod,
    Protocol(Protocol),
    New,
    MarkIsClear(u32),
}

/// A change of the mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MarkChange {
    Or(u32),
    Xor(u32),
}

/// What becomes of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Drop,
    Reject,
    Return,
    Jump(String),
    Goto(String),
}

/// A chain.
#[derive(Clone, Debug, Default)]
pub(super) struct Chain {
    /// Where the kernel calls it, and its priority among others there.
    pub(super) hook: Option<(String, i32)>,
    pub(super) rules: Vec<Vec<Statement>>,
}

/// A family's table.
#[derive(Clone, Debug, Default)]
pub(super) struct NftTable {
    pub(super) chains: BTreeMap<String, Chain>,
    /// Sets and maps; elements of sets have no verdict.
    pub(super) sets: BTreeMap<String, BTreeMap<String, Option<Verdict>>>,
}

/// Both families'.
#[derive(Clone, Debug, Default)]
pub(super) struct Tables(BTreeMap<Family, NftTable>);

impl Tables {
    /// Carries transactions out, line by line.
    pub(super) fn read(text: &str) -> Result<Self, TraceError> {
        let mut tables = Self::default();
        for line in text.lines() {
            let told = tables.take(&mut Words::of(line));
            told.map_err(|what| TraceError::Unreadable { line: line.to_owned(), what })?;
        }
        Ok(tables)
    }

    pub(super) fn of(&self, family: Family) -> Option<&NftTable> {
        self.0.get(&family)
    }

    fn take(&mut self, words: &mut Words<'_>) -> Result<(), String> {
        let (verb, object) = (words.any()?, words.any()?);
        let family = match words.any()? {
            "ip" => Family::V4,
            "ip6" => Family::V6,
            other => return Err(format!("family {other}")),
        };
        words.expect(crate::rules::nftables::TABLE)?;
        match (verb, object) {
            ("add", "table") => drop(self.0.entry(family).or_default()),
            ("delete", "table") => drop(self.0.remove(&family)),
            _ => {
                let table = self.0.get_mut(&family).ok_or("the table is not there")?;
                return table.take(verb, object, words.any()?, words);
            }
        }
        Ok(())
    }
}

impl NftTable {
    fn take(&mut self, verb: &str, object: &str, name: &str, words: &mut Words<'_>) -> Result<(), String> {
        match (verb, object) {
            ("add", "set" | "map") => drop(self.sets.entry(name.to_owned()).or_default()),
            ("delete", "set" | "map") => {
                self.sets.remove(name).ok_or("not there")?;
            }
            ("add", "chain") => {
                let hook = if words.is_done() { None } else { Some(hook(words)?) };
                self.chains.entry(name.to_owned()).or_insert_with(|| Chain { hook, rules: Vec::new() });
            }
            ("flush", "chain") => self.chain(name)?.rules.clear(),
            ("delete", "chain") => {
                self.chains.remove(name).ok_or("not there")?;
            }
            ("add", "rule") => {
                let rule = rule(words)?;
                self.chain(name)?.rules.push(rule);
            }
            ("add" | "delete", "element") => {
                let (key, verdict) = element(words)?;
                let set = self.sets.get_mut(name).ok_or("no such set")?;
                match verb {
                    "add" => drop(set.insert(key, verdict)),
                    _ => {
                        set.remove(&key).ok_or("no such element")?;
                    }
                }
            }
            _ => return Err(format!("{verb} {object}")),
        }
        Ok(())
    }

    fn chain(&mut self, name: &str) -> Result<&mut Chain, String> {
        self.chains.get_mut(name).ok_or_else(|| "no such chain".to_owned())
    }
}

/// `{ type filter hook input priority 0 ; }`
fn hook(words: &mut Words<'_>) -> Result<(String, i32), String> {
    words.expect("{")?;
    words.expect("type")?;
    words.any()?;
    words.expect("hook")?;
    let name = words.any()?.to_owned();
    words.expect("priority")?;
    let priority = words.parsed()?;
    words.expect(";")?;
    words.expect("}")?;
    Ok((name, priority))
}

/// `{ 10.96.0.1 . tcp . 80 comment "…" : goto chain }`; sets have no verdict.
fn element(words: &mut Words<'_>) -> Result<(String, Option<Verdict>), String> {
    words.expect("{")?;
    let mut key = vec![words.any()?];
    while words.next_is(".") {
        key.extend([words.any()?, words.any()?]);
    }
    words.comment()?;
    let verdict = if words.next_is(":") {
        words.any()?;
        Some(verdict(words)?)
    } else {
        None
    };
    words.expect("}")?;
    Ok((key.join(" "), verdict))
}

fn rule(words: &mut Words<'_>) -> Result<Vec<Statement>, String> {
    let mut statements = Vec::new();
    while !words.is_done() {
        if words.next_is("comment") {
            words.comment()?;
        } else {
            statements.push(statement(words)?);
        }
    }
    Ok(statements)
}

fn statement(words: &mut Words<'_>) -> Result<Statement, String> {
    if let Some("drop" | "reject" | "return" | "jump" | "goto") = words.peek() {
        return Ok(Statement::Verdict(verdict(words)?));
    }
    Ok(match words.any()? {
        "ip" | "ip6" => match words.any()? {
            "daddr" => destination(words)?,
            "saddr" => source(words)?,
            other => return Err(format!("field {other}")),
        },
        "iifname" => {
            let not = words.next_is("!=");
            if not {
                words.any()?;
            }
            words.any()?;
            Statement::Is(if not { Test::NotFromPod } else { Test::FromPod })
        }
        "meta" => {
            words.expect("l4proto")?;
            if words.next_is(".") {
                lookup(words, false)?
            } else {
                Statement::Is(Test::Protocol(protocol(words.any()?)?))
            }
        }
        "fib" => {
            ["saddr", "type", "local"].iter().try_for_each(|word| words.expect(word))?;
            Statement::Is(Test::SrcLocal)
        }
        "ct" => {
            ["state", "new"].iter().try_for_each(|word| words.expect(word))?;
            Statement::Is(Test::New)
        }
        "mark" => mark(words)?,
        "masquerade" => {
            words.expect("fully-random")?;
            Statement::Masquerade
        }
        "dnat" => {
            words.expect("to")?;
            Statement::Dnat(words.parsed()?)
        }
        "numgen" => choice(words)?,
        "update" => {
            set_name(words)?;
            words.expect("{")?;
            while words.any()? != "}" {}
            Statement::RememberSource
        }
        other => return Err(format!("statement {other}")),
    })
}

/// After `daddr`: a lookup, a set, or an address.
fn destination(words: &mut Words<'_>) -> Result<Statement, String> {
    if words.next_is(".") {
        [".", "meta", "l4proto"].iter().try_for_each(|word| words.expect(word))?;
        return lookup(words, true);
    }
    Ok(Statement::Is(match words.peek() {
        Some(word) if word.starts_with('@') => Test::DstInSet(set_name(words)?),
        _ => Test::Dst(net(words.any()?)?),
    }))
}

/// After `saddr`: a set that rules fill, or addresses.
fn source(words: &mut Words<'_>) -> Result<Statement, String> {
    if words.peek().is_some_and(|word| word.starts_with('@')) {
        set_name(words)?;
        return Ok(Statement::RecentSource);
    }
    let not = words.next_is("!=");
    if not {
        words.any()?;
    }
    let mut nets = Vec::new();
    if words.next_is("{") {
        words.any()?;
        while !words.next_is("}") {
            nets.push(net(words.any()?.trim_end_matches(','))?);
        }
        words.any()?;
    } else {
        nets.push(net(words.any()?)?);
    }
    Ok(Statement::Is(if not { Test::SrcNotIn(nets) } else { Test::SrcIn(nets) }))
}

/// After `l4proto`: `. th dport vmap @map`.
fn lookup(words: &mut Words<'_>, with_addr: bool) -> Result<Statement, String> {
    [".", "th", "dport", "vmap"].iter().try_for_each(|word| words.expect(word))?;
    Ok(Statement::Lookup { with_addr, map: set_name(words)? })
}

/// After `mark`: `set mark or 0x4000`, or `and 0x4000 == 0`.
fn mark(words: &mut Words<'_>) -> Result<Statement, String> {
    if words.next_is("and") {
        words.any()?;
        let bits = bits(words.any()?)?;
        ["==", "0"].iter().try_for_each(|word| words.expect(word))?;
        return Ok(Statement::Is(Test::MarkIsClear(bits)));
    }
    ["set", "mark"].iter().try_for_each(|word| words.expect(word))?;
    Ok(Statement::Mark(match (words.any()?, bits(words.any()?)?) {
        ("or", bits) => MarkChange::Or(bits),
        ("xor", bits) => MarkChange::Xor(bits),
        (other, _) => return Err(format!("mark {other}")),
    }))
}

/// After `numgen`: `random mod 2 vmap { 0 : goto a , 1 : goto b }`. Every number must have its verdict.
fn choice(words: &mut Words<'_>) -> Result<Statement, String> {
    ["random", "mod"].iter().try_for_each(|word| words.expect(word))?;
    let count: usize = words.parsed()?;
    ["vmap", "{"].iter().try_for_each(|word| words.expect(word))?;
    let mut verdicts = Vec::new();
    for index in 0..count {
        if index > 0 {
            words.expect(",")?;
        }
        words.expect(&index.to_string())?;
        words.expect(":")?;
        verdicts.push(verdict(words)?);
    }
    words.expect("}")?;
    Ok(Statement::Choose(verdicts))
}

fn verdict(words: &mut Words<'_>) -> Result<Verdict, String> {
    Ok(match words.any()? {
        "drop" => Verdict::Drop,
        "reject" => Verdict::Reject,
        "return" => Verdict::Return,
        "jump" => Verdict::Jump(words.any()?.to_owned()),
        "goto" => Verdict::Goto(words.any()?.to_owned()),
        other => return Err(format!("verdict {other}")),
    })
}

fn set_name(words: &mut Words<'_>) -> Result<String, String> {
    let word = words.any()?;
    word.strip_prefix('@').map(str::to_owned).ok_or_else(|| format!("{word} is no set"))
}

fn net(text: &str) -> Result<IpNet, String> {
    match text.parse::<IpAddr>() {
        Ok(addr) => Ok(addr.into()),
        Err(_) => text.parse().map_err(|error| format!("{text}: {error}")),
    }
}

fn bits(text: &str) -> Result<u32, String> {
    let digits = text.strip_prefix("0x").ok_or_else(|| format!("{text} is no hexadecimal number"))?;
    u32::from_str_radix(digits, 16).map_err(|error| format!("{text}: {error}"))
}

fn protocol(text: &str) -> Result<Protocol, String> {
    [Protocol::Tcp, Protocol::Udp, Protocol::Sctp]
        .into_iter()
        .find(|protocol| names::protocol(*protocol) == text)
        .ok_or_else(|| format!("protocol {text}"))
}

/// A line's words, one after the other.
struct Words<'a> {
    rest: &'a str,
}

impl<'a> Words<'a> {
    fn of(line: &'a str) -> Self {
        Self { rest: line.trim() }
    }

    fn is_done(&self) -> bool {
        self.rest.is_empty()
    }

    fn peek(&self) -> Option<&'a str> {
        self.rest.split(' ').next().filter(|word| !word.is_empty())
    }

    fn next_is(&self, word: &str) -> bool {
        self.peek() == Some(word)
    }

    fn any(&mut self) -> Result<&'a str, String> {
        let word = self.peek().ok_or("the line ends too early")?;
        self.rest = self.rest[word.len()..].trim_start();
        Ok(word)
    }

    fn expect(&mut self, wanted: &str) -> Result<(), String> {
        match self.any()? {
            word if word == wanted => Ok(()),
            word => Err(format!("{word} instead of {wanted}")),
        }
    }

    fn parsed<T: std::str::FromStr>(&mut self) -> Result<T, String> {
        let word = self.any()?;
        word.parse().map_err(|_| format!("{word} can't be read"))
    }

    /// `comment "…"`, if there is one.
    fn comment(&mut self) -> Result<(), String> {
        if let Some(rest) = self.rest.strip_prefix("comment \"") {
            let (_, rest) = rest.split_once('"').ok_or("a comment doesn't end")?;
            self.rest = rest.trim_start();
        }
        Ok(())
    }
}
