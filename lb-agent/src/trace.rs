//! `--trace-packets`: which packets the tracing build of the programs logs.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, bail};
use lb_common::abi::TraceFilter;

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

#[cfg(test)]
mod tests {
    use super::*;

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
