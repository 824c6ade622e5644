//! How much a flow entry remembers of a TCP connection, and when an entry may be replaced.
//!
//! Each direction's entry carries the flags its own direction has shown; both together say whether the connection
//! is over. That is all a load balancer needs: it never drops for being out of window.

use crate::net::{PROTO_TCP, tcp_flags};

/// The direction has sent a FIN.
pub const SEEN_FIN: u8 = 1 << 0;
/// The direction has sent a RST.
pub const SEEN_RST: u8 = 1 << 1;
/// The direction has sent something other than a SYN.
pub const SEEN_DATA: u8 = 1 << 2;

/// One tick is 2^30 ns, about 1.07 s: `ktime >> 30` is a shift where seconds would be a division.
pub const TICK_SHIFT: u32 = 30;

/// A closed connection's entry may be replaced after this many ticks (Cilium's close timeout is 10 s too).
pub const CLOSED_TICKS: u32 = 10;
/// A half-open connection (SYN only) may be replaced after this many ticks (netfilter: 60–120 s).
pub const SYN_TICKS: u32 = 60;
/// An idle UDP flow may be replaced after this many ticks (netfilter: 120 s for a two-way stream).
pub const UDP_TICKS: u32 = 120;
/// An idle established connection may be replaced after this many ticks, about six hours.
pub const ESTABLISHED_TICKS: u32 = 20_000;

/// The bits a segment with these TCP flags adds to its direction's state.
#[inline(always)]
pub const fn seen(flags: u8) -> u8 {
    let mut bits = 0;
    if flags & tcp_flags::FIN != 0 {
        bits |= SEEN_FIN;
    }
    if flags & tcp_flags::RST != 0 {
        bits |= SEEN_RST;
    }
    if flags & tcp_flags::SYN == 0 {
        bits |= SEEN_DATA;
    }
    bits
}

/// Both directions have said FIN, or one has said RST.
#[inline(always)]
pub const fn is_closed(this: u8, twin: u8) -> bool {
    (this | twin) & SEEN_RST != 0 || (this & twin & SEEN_FIN) != 0
}

/// How long an entry in this state may be idle, in ticks, before its place may be given to another flow.
#[inline(always)]
pub const fn idle_limit_ticks(proto: u8, this: u8, twin: u8) -> u32 {
    if proto != PROTO_TCP {
        UDP_TICKS
    } else if is_closed(this, twin) {
        CLOSED_TICKS
    } else if (this | twin) & SEEN_DATA == 0 {
        SYN_TICKS
    } else {
        ESTABLISHED_TICKS
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::{PROTO_UDP, tcp_flags::*};

    #[test]
    fn a_connection_is_closed_by_two_fins_or_one_rst() {
        let rows = [
            (SYN, SYN | ACK, false),
            (FIN | ACK, ACK, false),
            (FIN | ACK, FIN | ACK, true),
            (RST, ACK, true),
            (ACK, RST | ACK, true),
        ];
        for (this, twin, closed) in rows {
            assert_eq!(is_closed(seen(this), seen(twin)), closed, "{this:#x} {twin:#x}");
        }
    }

    #[test]
    fn idle_limits_follow_the_state() {
        assert_eq!(idle_limit_ticks(PROTO_UDP, 0, 0), UDP_TICKS);
        assert_eq!(idle_limit_ticks(PROTO_TCP, seen(SYN), 0), SYN_TICKS);
        assert_eq!(idle_limit_ticks(PROTO_TCP, seen(SYN), seen(ACK)), ESTABLISHED_TICKS);
        assert_eq!(idle_limit_ticks(PROTO_TCP, seen(RST), 0), CLOSED_TICKS);
    }
}
