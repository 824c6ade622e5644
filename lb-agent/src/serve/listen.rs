//! Sockets to listen on, as Go's `net.Listen("tcp", …)` makes them (Go: `net/ipsock_posix.go`, `favoriteAddrFamily`).

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
};

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpListener;

/// Connections that wait to be taken.
const BACKLOG: i32 = 1024;

/// Listens on an address. `0.0.0.0` and `::` both mean all addresses of both families, or of IPv4 if the kernel has no IPv6.
/// To be called within a runtime.
pub fn listen(addr: SocketAddr) -> io::Result<TcpListener> {
    if !addr.ip().is_unspecified() {
        return one(addr);
    }
    match one((Ipv6Addr::UNSPECIFIED, addr.port()).into()) {
        Err(error) if error.kind() != io::ErrorKind::AddrInUse => {
            one((Ipv4Addr::UNSPECIFIED, addr.port()).into())
        }
        dual => dual,
    }
}

fn one(addr: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    if addr.is_ipv6() {
        // The sysctl bindv6only may say otherwise.
        socket.set_only_v6(!addr.ip().is_unspecified())?;
    }
    socket.set_reuse_address(true)?;
    socket.bind(&addr.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, TcpStream};

    use super::*;

    /// Who of the loopback device's two addresses answers.
    fn answering(listener: &TcpListener) -> [bool; 2] {
        let port = listener.local_addr().unwrap().port();
        let answers = |addr: IpAddr| TcpStream::connect((addr, port)).is_ok();
        [answers(Ipv4Addr::LOCALHOST.into()), answers(Ipv6Addr::LOCALHOST.into())]
    }

    #[tokio::test]
    async fn all_addresses_are_those_of_both_families() {
        for (addr, expected) in [
            ("0.0.0.0:0", [true, true]),
            ("[::]:0", [true, true]),
            ("127.0.0.1:0", [true, false]),
            ("[::1]:0", [false, true]),
        ] {
            assert_eq!(answering(&listen(addr.parse().unwrap()).unwrap()), expected, "{addr}");
        }
    }

    #[tokio::test]
    async fn a_port_that_one_family_has_is_taken() {
        let holder = listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let port = holder.local_addr().unwrap().port();
        for addr in ["0.0.0.0", "::"] {
            let addr: IpAddr = addr.parse().unwrap();
            assert_eq!(listen((addr, port).into()).unwrap_err().kind(), io::ErrorKind::AddrInUse, "{addr}");
        }
    }
}
