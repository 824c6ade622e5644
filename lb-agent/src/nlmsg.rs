//! netlink by hand, for subsystems that no library of ours knows: messages and attributes.
//!
//! `include/uapi/linux/netlink.h`. Headers are in native byte order.

use std::io;

use netlink_sys::{Socket, SocketAddr as Kernel};

/// `NLMSG_ERROR`, `NLMSG_DONE` and `NLM_F_*` (`include/uapi/linux/netlink.h`).
const ERROR: u16 = 2;
const DONE: u16 = 3;
/// The kernel is asked.
pub const REQUEST: u16 = 1;
/// It is to say that it has done so.
pub const ACK: u16 = 4;
/// `NLM_F_DUMP_INTR`: what was listed changed meanwhile, so that something may be missing.
const DUMP_INTERRUPTED: u16 = 16;
/// All objects.
pub const DUMP: u16 = 0x300;
/// Made if not there.
pub const CREATE: u16 = 0x400;

/// `NLA_F_NESTED`: the attribute holds attributes.
const NESTED: u16 = 0x8000;

/// Length of a message's header.
const HEADER: usize = 16;

/// A socket to one subsystem in this network namespace.
pub struct Link {
    socket: Socket,
    sequence: u32,
}

impl Link {
    /// Opens it; `protocol` is a `NETLINK_*`.
    pub fn open(protocol: isize) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Sends a message of this type.
    pub fn send(&mut self, kind: u16, flags: u16, payload: &[u8]) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let len = HEADER + payload.len();
        let mut message = Vec::with_capacity(len);
        message.extend((len as u32).to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend(flags.to_ne_bytes());
        message.extend(self.sequence.to_ne_bytes());
        // The kernel fills our port in.
        message.extend(0u32.to_ne_bytes());
        message.extend(payload);
        self.socket.send_to(&message, &Kernel::new(0, 0), 0).map(drop)
    }

    /// Hands over type and payload of each message of the answer, until its end. A list that is not whole ends with
    /// [`io::ErrorKind::Interrupted`].
    pub fn receive(&self, mut take: impl FnMut(u16, &[u8])) -> io::Result<()> {
        let mut is_whole = true;
        loop {
            if let Some(end) = read(&self.datagram()?, self.sequence, &mut is_whole, &mut take) {
                return end;
            }
        }
    }

    /// The next datagram; a signal that comes in between changes nothing.
    fn datagram(&self) -> io::Result<Vec<u8>> {
        loop {
            match self.socket.recv_from_full() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                received => return received.map(|(datagram, _)| datagram),
            }
        }
    }
}

/// Asks for a list again that was not whole, some times.
pub fn listed<T>(mut list: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    for _ in 1..LIST_TRIES {
        match list() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
    list()
}

/// How often it is listed before it is said that it can't be.
const LIST_TRIES: u32 = 5;

/// Hands over what a datagram has of an answer, and says how it ended if it did.
fn read(
    datagram: &[u8],
    sequence: u32,
    is_whole: &mut bool,
    mut take: impl FnMut(u16, &[u8]),
) -> Option<io::Result<()>> {
    for message in messages(datagram).filter(|message| message.sequence == sequence) {
        *is_whole &= message.flags & DUMP_INTERRUPTED == 0;
        match message.kind {
            DONE if *is_whole => return Some(Ok(())),
            DONE => return Some(Err(io::ErrorKind::Interrupted.into())),
            ERROR => return Some(outcome(message.payload)),
            kind => take(kind, message.payload),
        }
    }
    None
}

/// What an error message says: a negative errno, or 0 for done.
fn outcome(payload: &[u8]) -> io::Result<()> {
    match payload.first_chunk().map(|bytes| i32::from_ne_bytes(*bytes)) {
        Some(0) => Ok(()),
        Some(errno) => Err(io::Error::from_raw_os_error(-errno)),
        None => Err(io::Error::other("the kernel's answer is truncated")),
    }
}

/// A message without its header.
struct Message<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    payload: &'a [u8],
}

/// The messages of a datagram.
fn messages(mut datagram: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let len = u32::from_ne_bytes(*datagram.first_chunk()?) as usize;
        let message = datagram.get(..len).filter(|_| len >= HEADER)?;
        datagram = datagram.get(aligned(len)..).unwrap_or_default();
        Some(Message {
            kind: u16::from_ne_bytes([message[4], message[5]]),
            flags: u16::from_ne_bytes([message[6], message[7]]),
            sequence: u32::from_ne_bytes([message[8], message[9], message[10], message[11]]),
            payload: &message[HEADER..],
        })
    })
}

fn aligned(len: usize) -> usize {
    (len + 3) & !3
}

/// The attributes of a payload: type, value.
pub fn attributes(mut payload: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let [l0, l1, k0, k1] = *payload.first_chunk()?;
        let len = usize::from(u16::from_ne_bytes([l0, l1]));
        let value = payload.get(4..len)?;
        payload = payload.get(aligned(len)..).unwrap_or_default();
        Some((u16::from_ne_bytes([k0, k1]) & !NESTED, value))
    })
}

/// The value of the first attribute of this type.
pub fn find(payload: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(payload).find_map(|(kind, value)| (kind == wanted).then_some(value))
}

/// An attribute that holds attributes.
pub fn nested(kind: u16, value: &[u8]) -> Vec<u8> {
    plain(kind | NESTED, value)
}

/// An attribute.
pub fn plain(kind: u16, value: &[u8]) -> Vec<u8> {
    let len = 4 + value.len();
    let mut bytes = Vec::with_capacity(aligned(len));
    bytes.extend((len as u16).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(aligned(len), 0);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, flags: u16, sequence: u32) -> Vec<u8> {
        let mut bytes = (HEADER as u32).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend(0u32.to_ne_bytes());
        bytes
    }

    #[test]
    fn a_list_that_changed_meanwhile_is_not_taken_for_whole() {
        for (flags, wanted) in [(0, Ok(())), (DUMP_INTERRUPTED, Err(io::ErrorKind::Interrupted))] {
            let (mut is_whole, mut taken) = (true, 0);
            let datagram = [message(7, flags, 3), message(7, 0, 2), message(7, 0, 3)].concat();
            assert!(read(&datagram, 3, &mut is_whole, |_, _| taken += 1).is_none());
            let end = read(&message(DONE, 0, 3), 3, &mut is_whole, |_, _| taken += 1).unwrap();
            assert_eq!((end.map_err(|error| error.kind()), taken), (wanted, 2));
        }
    }

    #[test]
    fn what_is_interrupted_is_tried_again_but_not_for_ever() {
        let after = |interruptions: u32, error: io::ErrorKind| {
            let mut calls = 0;
            let result = listed(|| {
                calls += 1;
                if calls <= interruptions { Err(io::Error::from(error)) } else { Ok(calls) }
            });
            (result.map_err(|error| error.kind()), calls)
        };
        let interrupted = io::ErrorKind::Interrupted;
        assert_eq!(after(0, interrupted), (Ok(1), 1));
        assert_eq!(after(4, interrupted), (Ok(5), 5));
        assert_eq!(after(9, interrupted), (Err(interrupted), 5));
        let denied = io::ErrorKind::PermissionDenied;
        assert_eq!(after(1, denied), (Err(denied), 1));
    }

    #[test]
    fn truncated_messages_and_attributes_end_the_reading() {
        assert_eq!(messages(&[40, 0, 0, 0, 1, 1]).count(), 0);
        assert_eq!(messages(&[0; 16]).count(), 0);
        assert_eq!(attributes(&[1, 0, 0, 0]).count(), 0);
        let whole = nested(1, &plain(2, &[7, 8, 9]));
        assert_eq!(find(find(&whole, 1).unwrap(), 2), Some(&[7, 8, 9][..]));
        (0..whole.len()).for_each(|len| assert_eq!(attributes(&whole[..len]).count(), 0, "{len}"));
    }
}
