//! `--trace-packets`: which packets the tracing build of the programs logs.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, bail};
use lb_common::{
    abi::TraceFilter,
    outcome::{Hook, Outcome},
};

/// Parses `any`, `10.0.0.5`, `10.0.0.5:80`, `:53/udp`, `[fd00::1]:443/tcp`, `fd00::1/tcp`.
pub fn parse_filter(text: &str) -> Result<TraceFilter> {
    let mut filter = TraceFilter::default();
    let (target, proto) = match text.rsplit_once('/') {
        Some((target, proto)) => (target, Some(proto)),
        None => (text, None),
    };
    filter.proto = match proto.map(str::to_ascii_lowercase).as_deref() {
        None => 0,
        Some("tcp") => 6,
        Some("udp") => 17,
        Some(other) => bail!("--trace-packets {text}: {other:?} is neither tcp nor udp"),
    };
    if target == "any" || target.is_empty() {
        return Ok(filter);
    }
    if let Some(port) = target.strip_prefix(':').filter(|port| !port.contains(':')) {
        filter.port = port.parse().with_context(|| format!("--trace-packets {text}: {port:?} is no port"))?;
        return Ok(filter);
    }
    let addr = if let Ok(socket) = target.parse::<SocketAddr>() {
        filter.port = socket.port();
        socket.ip()
    } else {
        target.parse::<IpAddr>().with_context(|| {
            format!("--trace-packets {text}: expected any, ADDRESS, ADDRESS:PORT or :PORT, with /tcp or /udp")
        })?
    };
    filter.addr = match addr {
        IpAddr::V4(addr) => addr.to_ipv6_mapped().octets(),
        IpAddr::V6(addr) => addr.octets(),
    };
    Ok(filter)
}

/// Prints what the tracing build logs, through tracing.
pub struct DecisionLog;

impl log::Log for DecisionLog {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        tracing::info!(target: "packet", "{}", with_names(&record.args().to_string()));
    }

    fn flush(&self) {}
}

/// The programs log hooks and outcomes as numbers: a table of names would not fit their stack.
fn with_names(line: &str) -> String {
    let mut words: Vec<&str> = line.split(' ').collect();
    for i in 1..words.len() {
        let number = words[i].parse::<usize>().ok();
        let name = match words[i - 1] {
            "hook" => number.and_then(|number| Hook::ALL.get(number)).map(|hook| hook.as_str()),
            "outcome" => number.and_then(|number| Outcome::ALL.get(number)).map(|outcome| outcome.as_str()),
            _ => None,
        };
        words[i] = name.unwrap_or(words[i]);
    }
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_get_their_names() {
        let line = format!("ended: hook {} outcome {} ifindex 2", Hook::Xdp as u32, Outcome::DropTtl as u32);
        let named = format!("ended: hook {} outcome drop_ttl ifindex 2", Hook::Xdp.as_str());
        assert_eq!(with_names(&line), named);
        assert_eq!(with_names("ended: outcome 250"), "ended: outcome 250");
    }

    #[test]
    fn filters_are_read() {
        let rows = [
            ("any", "::", 0, 0),
            ("10.0.0.5", "::ffff:10.0.0.5", 0, 0),
            ("10.0.0.5:80", "::ffff:10.0.0.5", 80, 0),
            (":53/udp", "::", 53, 17),
            ("[fd00::1]:443/TCP", "fd00::1", 443, 6),
            ("fd00::1/tcp", "fd00::1", 0, 6),
        ];
        for (text, addr, port, proto) in rows {
            let filter = parse_filter(text).expect(text);
            let expected: std::net::Ipv6Addr = addr.parse().unwrap();
            assert_eq!((filter.addr, filter.port, filter.proto), (expected.octets(), port, proto), "{text}");
        }
    }

    #[test]
    fn bad_filters_say_what_is_expected() {
        for text in ["10.0.0", ":http", "any/icmp"] {
            assert!(parse_filter(text).unwrap_err().to_string().contains(text), "{text}");
        }
    }
}
