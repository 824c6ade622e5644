//! Frames, built field by field with right checksums: input and expectation come from the same builder.

use std::net::{IpAddr, SocketAddr};

use lb_common::{csum, net::tcp_flags};

/// Bytes of an Ethernet address.
pub type Mac = [u8; 6];

/// What a frame says; `build` makes the bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Ethernet destination.
    pub dmac: Mac,
    /// Ethernet source.
    pub smac: Mac,
    /// Source.
    pub src: SocketAddr,
    /// Destination, of the same family.
    pub dst: SocketAddr,
    /// TTL or hop limit.
    pub ttl: u8,
    /// Transport.
    pub l4: L4,
    /// IPv4 options, a multiple of four bytes; or IPv6 extension headers, the first's type before them.
    pub options: Vec<u8>,
    /// What follows the transport header.
    pub payload: Vec<u8>,
}

/// A transport header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum L4 {
    /// TCP.
    Tcp {
        /// Flag bits.
        flags: u8,
        /// Sequence number.
        seq: u32,
        /// Acknowledgement number.
        ack: u32,
        /// Window.
        window: u16,
        /// Options, a multiple of four bytes.
        options: Vec<u8>,
    },
    /// UDP.
    Udp {
        /// Without checksum (IPv4 only).
        no_checksum: bool,
    },
}

/// A SYN with the options that Linux sends.
pub fn syn(src: &str, dst: &str) -> Frame {
    let options = [2, 4, 5, 180, 4, 2, 8, 10, 1, 2, 3, 4, 0, 0, 0, 0, 1, 3, 3, 7].to_vec();
    frame(src, dst, L4::Tcp { flags: tcp_flags::SYN, seq: 0x1234_5678, ack: 0, window: 64240, options })
}

/// A segment with these flags and a little payload.
pub fn tcp(src: &str, dst: &str, flags: u8) -> Frame {
    let l4 = L4::Tcp { flags, seq: 0x1234_5679, ack: 0x0bad_cafe, window: 501, options: Vec::new() };
    Frame { payload: b"payload".to_vec(), ..frame(src, dst, l4) }
}

/// A datagram.
pub fn udp(src: &str, dst: &str) -> Frame {
    Frame { payload: b"question".to_vec(), ..frame(src, dst, L4::Udp { no_checksum: false }) }
}

fn frame(src: &str, dst: &str, l4: L4) -> Frame {
    Frame {
        dmac: [0; 6],
        smac: [0; 6],
        src: src.parse().expect("an address and port"),
        dst: dst.parse().expect("an address and port"),
        ttl: 63,
        l4,
        options: Vec::new(),
        payload: Vec::new(),
    }
}

impl Frame {
    /// From one Ethernet address to another.
    pub fn macs(mut self, smac: Mac, dmac: Mac) -> Self {
        (self.smac, self.dmac) = (smac, dmac);
        self
    }

    /// With other addresses.
    pub fn between(mut self, src: SocketAddr, dst: SocketAddr) -> Self {
        (self.src, self.dst) = (src, dst);
        self
    }

    /// With another TTL.
    pub fn ttl(mut self, ttl: u8) -> Self {
        self.ttl = ttl;
        self
    }

    /// The reset that refuses this SYN: its options blanked.
    pub fn refusal(&self) -> Self {
        let L4::Tcp { seq, options, .. } = &self.l4 else { panic!("only a SYN is reset") };
        Self {
            dmac: self.smac,
            smac: self.dmac,
            src: self.dst,
            dst: self.src,
            ttl: 64,
            l4: L4::Tcp {
                flags: tcp_flags::RST | tcp_flags::ACK,
                seq: 0,
                ack: seq.wrapping_add(1),
                window: 0,
                options: vec![1; options.len()],
            },
            ..self.clone()
        }
    }

    /// The reset that answers this segment in mid-stream: its data goes back with it.
    pub fn reset(&self) -> Self {
        let L4::Tcp { ack, .. } = &self.l4 else { panic!("only a segment is reset") };
        let mut reset = self.refusal();
        reset.l4 = L4::Tcp { flags: tcp_flags::RST, seq: *ack, ack: 0, window: 0, options: Vec::new() };
        reset
    }

    /// The ICMP port unreachable that refuses this datagram.
    pub fn unreachable(&self) -> Vec<u8> {
        let original = self.build();
        let (mut out, v4) = ([self.smac, self.dmac].concat(), self.src.is_ipv4());
        let header = if v4 { 20 } else { 40 };
        let quoted = &original[14..14 + header + 8];
        let mut icmp = if v4 { vec![3, 3, 0, 0, 0, 0, 0, 0] } else { vec![1, 4, 0, 0, 0, 0, 0, 0] };
        icmp.extend(quoted);
        let pseudo = if v4 { 0 } else { pseudo_sum(self.dst.ip(), self.src.ip(), 58, icmp.len()) };
        let sum = !csum::fold(csum::sum(&icmp) + pseudo);
        icmp[2..4].copy_from_slice(&sum.to_ne_bytes());
        out.extend(if v4 { [8, 0] } else { [0x86, 0xdd] });
        match (self.dst.ip(), self.src.ip()) {
            (IpAddr::V4(s), IpAddr::V4(d)) => {
                let mut ip = vec![0x45, 0xc0, 0, 56, 0, 0, 0x40, 0, 64, 1, 0, 0];
                ip.extend(s.octets());
                ip.extend(d.octets());
                let sum = !csum::fold(csum::sum(&ip));
                ip[10..12].copy_from_slice(&sum.to_ne_bytes());
                out.extend(ip);
            }
            (IpAddr::V6(s), IpAddr::V6(d)) => {
                out.extend([0x60, 0, 0, 0, 0, icmp.len() as u8, 58, 64]);
                out.extend(s.octets());
                out.extend(d.octets());
            }
            _ => panic!("both addresses are of one family"),
        }
        out.extend(icmp);
        out
    }

    /// The bytes.
    pub fn build(&self) -> Vec<u8> {
        let l4 = self.transport();
        let proto = match self.l4 {
            L4::Tcp { .. } => 6,
            L4::Udp { .. } => 17,
        };
        let mut out = [self.dmac, self.smac].concat();
        match (self.src.ip(), self.dst.ip()) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let header = 20 + self.options.len();
                let mut ip = vec![0x40 | (header / 4) as u8, 0];
                ip.extend(((header + l4.len()) as u16).to_be_bytes());
                ip.extend([0x12, 0x34, 0x40, 0, self.ttl, proto, 0, 0]);
                ip.extend(src.octets());
                ip.extend(dst.octets());
                ip.extend(&self.options);
                let sum = !csum::fold(csum::sum(&ip));
                ip[10..12].copy_from_slice(&sum.to_ne_bytes());
                out.extend([8, 0]);
                out.extend(ip);
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let (next, extensions) =
                    self.options.split_first().map_or((proto, &[][..]), |(first, rest)| (*first, rest));
                out.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
                out.extend(((extensions.len() + l4.len()) as u16).to_be_bytes());
                out.extend([next, self.ttl]);
                out.extend(src.octets());
                out.extend(dst.octets());
                out.extend(extensions);
            }
            _ => panic!("both addresses are of one family"),
        }
        out.extend(l4);
        out
    }

    fn transport(&self) -> Vec<u8> {
        let mut l4 = [self.src.port().to_be_bytes(), self.dst.port().to_be_bytes()].concat();
        let (proto, at) = match &self.l4 {
            L4::Tcp { flags, seq, ack, window, options } => {
                l4.extend(seq.to_be_bytes());
                l4.extend(ack.to_be_bytes());
                l4.extend([((5 + options.len() / 4) << 4) as u8, *flags]);
                l4.extend(window.to_be_bytes());
                l4.extend([0; 4]);
                l4.extend(options);
                (6, 16)
            }
            L4::Udp { .. } => {
                l4.extend(((8 + self.payload.len()) as u16).to_be_bytes());
                l4.extend([0; 2]);
                (17, 6)
            }
        };
        l4.extend(&self.payload);
        if self.l4 != (L4::Udp { no_checksum: true }) {
            let sum = !csum::fold(csum::sum(&l4) + pseudo_sum(self.src.ip(), self.dst.ip(), proto, l4.len()));
            l4[at..at + 2].copy_from_slice(&sum.to_ne_bytes());
        }
        l4
    }
}

fn pseudo_sum(src: IpAddr, dst: IpAddr, proto: u8, len: usize) -> u32 {
    let addrs = match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => [src.octets(), dst.octets()].concat(),
        (IpAddr::V6(src), IpAddr::V6(dst)) => [src.octets(), dst.octets()].concat(),
        _ => panic!("both addresses are of one family"),
    };
    csum::sum(&addrs) + csum::sum(&[0, proto]) + csum::sum(&(len as u16).to_be_bytes())
}

/// Bytes as people read them, 16 a line.
pub fn hex(bytes: &[u8]) -> String {
    let line = |chunk: &[u8]| chunk.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ");
    bytes.chunks(16).map(line).collect::<Vec<_>>().join("\n")
}
