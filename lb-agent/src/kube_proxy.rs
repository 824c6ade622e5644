//! A kube-proxy that runs on this node.
//!
//! Its rules and ours have the same names: once it serves instead of our agent, what bears our mark is its own.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

/// `Server` in the head of an agent's answers: it serves the same pages.
pub const NOT_KUBE_PROXY: &str = concat!("lb-agent/", env!("CARGO_PKG_VERSION"));

/// It answers from this machine's memory, or not at all.
const LIMIT: Duration = Duration::from_secs(2);
/// Bytes of an answer that matter.
const ANSWER: u64 = 4096;

/// Which rules a running kube-proxy writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Serves {
    /// xtables, in mode iptables or ipvs: they share chains.
    Xtables,
    /// The table `kube-proxy` of nftables.
    Nftables,
}

/// Asks kube-proxy's metrics server, `--metrics-bind-address`, for `/proxyMode`
/// (kube-proxy: `cmd/kube-proxy/app/server.go` `serveMetrics`). `None` when there is none.
pub fn serves(metrics: SocketAddr) -> Option<Serves> {
    match mode(metrics).ok()??.as_str() {
        "iptables" | "ipvs" => Some(Serves::Xtables),
        "nftables" => Some(Serves::Nftables),
        _ => None,
    }
}

/// The body of the answer, if it is one to the question.
fn mode(metrics: SocketAddr) -> std::io::Result<Option<String>> {
    let mut stream = TcpStream::connect_timeout(&metrics, LIMIT)?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    stream.write_all(format!("GET /proxyMode HTTP/1.0\r\nHost: {metrics}\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.take(ANSWER).read_to_string(&mut answer)?;
    let Some((head, body)) = answer.split_once("\r\n\r\n") else { return Ok(None) };
    let is_agent = head.to_ascii_lowercase().contains("\r\nserver: lb-agent");
    let found = head.split(' ').nth(1) == Some("200") && !is_agent;
    Ok(found.then(|| body.trim().to_owned()))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    /// What is made of an answer.
    fn asked(answer: &'static str) -> Option<Serves> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut question = [0; 512];
            let length = stream.read(&mut question).unwrap();
            assert!(question[..length].starts_with(b"GET /proxyMode HTTP/1.0\r\n"));
            stream.write_all(answer.as_bytes()).unwrap();
        });
        let serves = serves(address);
        server.join().unwrap();
        serves
    }

    #[test]
    fn a_running_kube_proxy_says_its_mode() {
        let head = "HTTP/1.0 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\n\r\n";
        for (mode, serves) in
            [("iptables", Serves::Xtables), ("ipvs", Serves::Xtables), ("nftables", Serves::Nftables)]
        {
            assert_eq!(asked(Box::leak(format!("{head}{mode}").into_boxed_str())), Some(serves));
        }
        assert_eq!(asked("HTTP/1.0 200 OK\r\n\r\nkernelspace"), None);
        assert_eq!(asked("HTTP/1.0 200 OK\r\nserver: lb-agent/0.1.0\r\n\r\nnftables"), None, "an agent's");
        assert_eq!(asked("HTTP/1.1 404 Not Found\r\n\r\nnftables"), None);
        assert_eq!(asked("SSH-2.0-OpenSSH_9.2\r\n"), None);
    }

    #[test]
    fn nobody_is_no_kube_proxy() {
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        assert_eq!(serves(free), None);
    }
}
