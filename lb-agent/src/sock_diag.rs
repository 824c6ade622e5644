//! Sockets that our hooks connected, as a network namespace lists them, and how to end one.
//!
//! `include/uapi/linux/sock_diag.h`, `inet_diag.h`: addresses and ports are in network order, all else in native order. The
//! kernel lists a TCP socket together with what `SOCK_PEERS` holds of it (Linux 5.7), so that none is mistaken for ours.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    os::fd::{AsRawFd, BorrowedFd},
};

use lb_common::abi::PeerValue;
use lb_core::model::{Family, Protocol};
use netlink_sys::protocols::NETLINK_SOCK_DIAG;

use crate::nlmsg::{ACK, DUMP, Link, REQUEST, find, listed, nested, plain};

/// Message types.
const BY_FAMILY: u16 = 20;
const DESTROY: u16 = 21;

/// `INET_DIAG_REQ_SK_BPF_STORAGES`, `SK_DIAG_BPF_STORAGE_REQ_MAP_FD`: asked for with a list.
const WANTED_STORAGES: u16 = 2;
const MAP_FD: u16 = 1;
/// `INET_DIAG_SK_BPF_STORAGES`, `SK_DIAG_BPF_STORAGE`, `SK_DIAG_BPF_STORAGE_MAP_VALUE`: what comes with a socket.
const STORAGES: u16 = 20;
const STORAGE: u16 = 1;
const MAP_VALUE: u16 = 3;

/// Length of `struct inet_diag_msg`, and of the `struct inet_diag_sockid` in it, which begins at its fifth byte.
const MESSAGE: usize = 72;
const ID: usize = 48;

/// States in which a socket has a peer (`include/net/tcp_states.h`; a connected UDP socket is established): established,
/// SYN sent and received, FIN wait 1 and 2, close wait, last ACK, closing.
const WITH_PEER: u32 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 11;

/// A connected socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connected {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// Whom it is connected to.
    pub peer: SocketAddr,
    /// The kernel's number for it, which is never given again.
    pub cookie: u64,
    /// What `SOCK_PEERS` holds of it; always `None` for UDP.
    pub noted: Option<PeerValue>,
    /// Of the socket, not of what it dialled.
    family: u8,
    id: [u8; ID],
}

/// A socket to the kernel's list of sockets of this network namespace.
pub struct SockDiag(Link);

impl SockDiag {
    /// Opens it.
    pub fn open() -> io::Result<Self> {
        Link::open(NETLINK_SOCK_DIAG).map(Self)
    }

    /// Connected sockets, with what the map `SOCK_PEERS` holds of them.
    pub fn connected(
        &mut self,
        family: Family,
        protocol: Protocol,
        peers: BorrowedFd<'_>,
    ) -> io::Result<Vec<Connected>> {
        let map = plain(MAP_FD, &peers.as_raw_fd().to_ne_bytes());
        let mut question = request(number(family), protocol, WITH_PEER, &[0; ID]);
        question.extend(nested(WANTED_STORAGES, &map));
        listed(|| {
            self.0.send(BY_FAMILY, REQUEST | DUMP, &question)?;
            let mut sockets = Vec::new();
            self.0.receive(|_, payload| sockets.extend(parse(protocol, payload)))?;
            Ok(sockets)
        })
    }

    /// Ends a socket: its process gets `ECONNABORTED`, and a TCP peer a reset (Linux 4.9, `CONFIG_INET_DIAG_DESTROY`).
    pub fn destroy(&mut self, socket: &Connected) -> io::Result<()> {
        match self.ask_to_destroy(socket.family, socket.protocol, &socket.id) {
            // It has ended meanwhile.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            result => result,
        }
    }

    fn ask_to_destroy(&mut self, family: u8, protocol: Protocol, id: &[u8; ID]) -> io::Result<()> {
        self.0.send(DESTROY, REQUEST | ACK, &request(family, protocol, u32::MAX, id))?;
        self.0.receive(|_, _| {})
    }
}

/// Whether this kernel lets sockets be ended, found out with one of our own.
pub fn can_destroy() -> io::Result<()> {
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    let port = socket.local_addr()?.port();
    socket.connect(socket.local_addr()?)?;
    let mut id = [0; ID];
    id[..2].copy_from_slice(&port.to_be_bytes());
    id[2..4].copy_from_slice(&port.to_be_bytes());
    id[4..8].copy_from_slice(&Ipv4Addr::LOCALHOST.octets());
    id[20..24].copy_from_slice(&Ipv4Addr::LOCALHOST.octets());
    // `INET_DIAG_NOCOOKIE`.
    id[40..].fill(0xff);
    SockDiag::open()?.ask_to_destroy(number(Family::V4), Protocol::Udp, &id)
}

fn number(family: Family) -> u8 {
    match family {
        Family::V4 => libc::AF_INET as u8,
        Family::V6 => libc::AF_INET6 as u8,
    }
}

/// `struct inet_diag_req_v2`.
fn request(family: u8, protocol: Protocol, states: u32, id: &[u8; ID]) -> Vec<u8> {
    let mut bytes = vec![family, protocol.number(), 0, 0];
    bytes.extend(states.to_ne_bytes());
    bytes.extend(id);
    bytes
}

/// A socket from its message.
fn parse(protocol: Protocol, payload: &[u8]) -> Option<Connected> {
    let id: [u8; ID] = payload.get(4..4 + ID)?.try_into().ok()?;
    let storage = find(payload.get(MESSAGE..)?, STORAGES).and_then(|storages| find(storages, STORAGE));
    let value = storage.and_then(|storage| find(storage, MAP_VALUE)?.get(..size_of::<PeerValue>()));
    let word = |at: usize| u64::from(u32::from_ne_bytes([id[at], id[at + 1], id[at + 2], id[at + 3]]));
    Some(Connected {
        protocol,
        peer: peer_of(payload[0], &id)?,
        cookie: word(40) | word(44) << 32,
        noted: value.and_then(|value| bytemuck::try_pod_read_unaligned(value).ok()),
        family: payload[0],
        id,
    })
}

/// The backend that a socket got, as it was noted; `None` if it has another peer by now, and so is not ours.
pub fn backend(socket: &Connected, noted: &PeerValue) -> Option<SocketAddr> {
    let backend = SocketAddr::new(Ipv6Addr::from(noted.backend).to_canonical(), noted.backend_port);
    (socket.peer == backend).then_some(backend)
}

/// The peer's address of a `struct inet_diag_sockid`.
fn peer_of(family: u8, id: &[u8; ID]) -> Option<SocketAddr> {
    let port = u16::from_be_bytes([id[2], id[3]]);
    let addr: IpAddr = match i32::from(family) {
        libc::AF_INET => <[u8; 4]>::try_from(&id[20..24]).ok()?.into(),
        _ => Ipv6Addr::from(<[u8; 16]>::try_from(&id[20..36]).ok()?).to_canonical(),
    };
    Some(SocketAddr::new(addr, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(family: i32, peer: &str, backend: &str) -> Vec<u8> {
        let parse = |text: &str| text.parse::<SocketAddr>().unwrap();
        let mapped = |addr: IpAddr| match addr {
            IpAddr::V4(addr) => addr.to_ipv6_mapped().octets(),
            IpAddr::V6(addr) => addr.octets(),
        };
        let mut bytes = vec![0; MESSAGE];
        bytes[0] = family as u8;
        bytes[6..8].copy_from_slice(&parse(peer).port().to_be_bytes());
        match parse(peer).ip() {
            IpAddr::V4(addr) if family == libc::AF_INET => bytes[24..28].copy_from_slice(&addr.octets()),
            addr => bytes[24..40].copy_from_slice(&mapped(addr)),
        }
        bytes[44..52].copy_from_slice(&[1, 0, 0, 0, 2, 0, 0, 0]);
        let backend = parse(backend);
        let value = PeerValue {
            frontend: [1; 16],
            backend: mapped(backend.ip()),
            frontend_port: 53,
            backend_port: backend.port(),
            backend_id: 7,
        };
        let storage = nested(STORAGE, &plain(MAP_VALUE, bytemuck::bytes_of(&value)));
        bytes.extend(nested(STORAGES, &storage));
        bytes
    }

    #[test]
    fn sockets_are_known_by_what_they_dialled() {
        for (family, peer, dialled, wanted) in [
            (libc::AF_INET, "10.1.0.1:53", "10.1.0.1:53", true),
            (libc::AF_INET6, "10.1.0.1:53", "10.1.0.1:53", true),
            (libc::AF_INET6, "[fd00::1]:53", "[fd00::1]:53", true),
            // It has connected again, to something that is no frontend.
            (libc::AF_INET, "10.1.0.2:53", "10.1.0.1:53", false),
            (libc::AF_INET, "10.1.0.1:54", "10.1.0.1:53", false),
        ] {
            let socket = parse(Protocol::Tcp, &message(family, peer, dialled)).unwrap();
            assert_eq!((socket.peer, socket.cookie), (peer.parse().unwrap(), 2 << 32 | 1));
            let backend = backend(&socket, &socket.noted.unwrap());
            assert_eq!(backend, wanted.then(|| dialled.parse().unwrap()), "{peer}");
        }
        let whole = message(libc::AF_INET, "10.1.0.1:53", "10.1.0.1:53");
        assert_eq!(parse(Protocol::Udp, &whole[..MESSAGE]).unwrap().noted, None);
        for len in 0..whole.len() {
            let socket = parse(Protocol::Udp, &whole[..len]);
            assert!(socket.is_none_or(|socket| socket.noted.is_none()), "{len}");
        }
    }
}
