//! Incremental Internet checksum (RFC 1071, RFC 1624).
//!
//! A *delta* is the folded one's-complement sum of what a rewrite adds: `!old + new` for every 16-bit word changed,
//! words in packet order. Applying a delta to a checksum field is `!fold(!field + delta)` (RFC 1624 eqn. 3). Deltas
//! of several words add up, so a flow stores one for its addresses and one for its ports and a packet costs two
//! additions, whatever its size.

/// Adds the carries of a one's-complement sum back in until 16 bits are left.
#[inline(always)]
pub const fn fold(mut sum: u32) -> u16 {
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}

/// One's-complement sum of bytes taken as native-endian words in packet order; an odd tail is padded with zero.
///
/// Sums up to 128 KiB exactly; longer input would overflow the 32-bit accumulator.
#[inline(always)]
pub fn sum(bytes: &[u8]) -> u32 {
    let mut total = 0;
    let mut i = 0;
    while i + 1 < bytes.len() {
        total += u16::from_ne_bytes([bytes[i], bytes[i + 1]]) as u32;
        i += 2;
    }
    if i < bytes.len() {
        total += u16::from_ne_bytes([bytes[i], 0]) as u32;
    }
    total
}

/// The delta of replacing `old` by `new`, both of the same even length.
#[inline(always)]
pub fn delta(old: &[u8], new: &[u8]) -> u16 {
    let mut total = 0;
    let mut i = 0;
    while i + 1 < old.len() && i + 1 < new.len() {
        total += (!u16::from_ne_bytes([old[i], old[i + 1]])) as u32;
        total += u16::from_ne_bytes([new[i], new[i + 1]]) as u32;
        i += 2;
    }
    fold(total)
}

/// [`delta`] for data taken as native-endian 32-bit words in packet order, such as addresses.
#[inline(always)]
pub fn delta_words(old: &[u32], new: &[u32]) -> u16 {
    let mut total = 0u64;
    let mut i = 0;
    while i < old.len() && i < new.len() {
        total += (!old[i]) as u64 + new[i] as u64;
        i += 1;
    }
    total = (total & 0xffff_ffff) + (total >> 32);
    total = (total & 0xffff) + (total >> 16);
    fold((total & 0xffff) as u32 + (total >> 16) as u32)
}

/// The delta of replacing one 16-bit word, both as they lie in the packet.
#[inline(always)]
pub const fn delta16(old: u16, new: u16) -> u16 {
    fold((!old) as u32 + new as u32)
}

/// Applies deltas to a checksum field as it lies in the packet.
#[inline(always)]
pub const fn apply(field: u16, deltas: u32) -> u16 {
    !fold((!field) as u32 + deltas)
}

/// [`apply`] for UDP over IPv4, where 0 means "no checksum" (RFC 768): such a field stays 0, and a sum that
/// comes out as 0 is sent as 0xffff.
#[inline(always)]
pub const fn apply_udp(field: u16, deltas: u32) -> u16 {
    if field == 0 {
        return 0;
    }
    match apply(field, deltas) {
        0 => 0xffff,
        sum => sum,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random_words(seed: u64) -> [u8; 40] {
        let mut state = seed | 1;
        core::array::from_fn(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
    }

    fn full(bytes: &[u8]) -> u16 {
        !fold(sum(bytes))
    }

    #[test]
    fn rfc_1071_example() {
        // RFC 1071 §3: 00 01 f2 03 f4 f5 f6 f7 sums to ddf2 in network order.
        let sum = fold(sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]));
        assert_eq!(sum.to_ne_bytes(), [0xdd, 0xf2]);
    }

    #[test]
    fn a_delta_gives_what_a_full_sum_gives() {
        for seed in 1..2000 {
            let old = random_words(seed);
            let mut new = old;
            new[12..20].copy_from_slice(&random_words(seed ^ 0x5555)[..8]);
            let incremental = apply(full(&old), delta(&old[12..20], &new[12..20]) as u32);
            // 0 and 0xffff are the same number in one's complement; a sum over non-zero data is never +0.
            let expected = full(&new);
            assert!(
                incremental == expected
                    || (incremental ^ expected) == 0xffff && (incremental == 0 || expected == 0),
                "seed {seed}: {incremental:04x} != {expected:04x}"
            );
        }
    }

    #[test]
    fn deltas_of_addresses_and_ports_add_up() {
        let old = random_words(7);
        let mut new = old;
        new[0..8].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
        new[20..24].copy_from_slice(&[0x1f, 0x90, 0x00, 0x50]);
        let deltas = delta(&old[0..8], &new[0..8]) as u32 + delta(&old[20..24], &new[20..24]) as u32;
        assert_eq!(apply(full(&old), deltas), full(&new));
    }

    #[test]
    fn deltas_by_words_and_by_halfwords_are_the_same_number() {
        for seed in 1..2000 {
            let (old, new) = (random_words(seed), random_words(seed ^ 0x77));
            let words = |bytes: &[u8; 40]| -> [u32; 10] {
                core::array::from_fn(|i| {
                    u32::from_ne_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]])
                })
            };
            let (a, b) = (delta(&old, &new), delta_words(&words(&old), &words(&new)));
            assert!(a == b || (a ^ b) == 0xffff && (a == 0 || b == 0), "seed {seed}: {a:04x} {b:04x}");
        }
    }

    #[test]
    fn udp_without_checksum_stays_without() {
        assert_eq!(apply_udp(0, 0x1234), 0);
    }

    #[test]
    fn udp_sum_of_zero_is_sent_as_all_ones() {
        let field = 0x1234;
        let deltas = delta16(!field, 0xffff) as u32;
        assert_eq!(apply(field, deltas), 0);
        assert_eq!(apply_udp(field, deltas), 0xffff);
    }
}
