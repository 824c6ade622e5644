//! Hashes that both sides compute, or that spread flows over slots.

/// Bits of the VIP filter: with 10 000 VIPs one address in seven is a false positive and costs two map lookups.
pub const VIP_FILTER_BITS: u32 = 1 << 16;

/// The VIP filter's bit for an address of four or sixteen bytes.
#[inline(always)]
pub fn vip_filter_bit(addr: &[u8]) -> u32 {
    let mut words = [0; 4];
    let len = addr.len() / 4;
    for (word, bytes) in words.iter_mut().zip(addr.chunks_exact(4)) {
        *word = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    }
    vip_filter_bit_of_words(&words[..len])
}

/// [`vip_filter_bit`] for an address taken as native-endian words in network order.
#[inline(always)]
pub fn vip_filter_bit_of_words(addr: &[u32]) -> u32 {
    let mut acc = 0u32;
    let mut i = 0;
    while i < addr.len() {
        acc = acc.rotate_left(5) ^ addr[i];
        i += 1;
    }
    // Fibonacci hashing: the high bits of a multiplication by 2^32/phi are the well-mixed ones.
    acc.wrapping_mul(0x9e37_79b1) >> 16
}

/// Mixes 64 bits (the finaliser of MurmurHash3, public domain).
#[inline(always)]
pub const fn mix64(mut x: u64) -> u64 {
    x ^= x >> 33;
    x = x.wrapping_mul(0xff51_afd7_ed55_8ccd);
    x ^= x >> 33;
    x = x.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    x ^ (x >> 33)
}

/// Scales a 32-bit hash to `0..n` without a division (Lemire, "Fast Random Integer Generation in an Interval").
#[inline(always)]
pub const fn scale(hash: u32, n: u32) -> u32 {
    ((hash as u64 * n as u64) >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filter_bits_stay_inside_the_filter() {
        for a in 0..=255 {
            assert!(vip_filter_bit(&[10, 96, a, 255 - a]) < VIP_FILTER_BITS);
            assert!(vip_filter_bit(&[a; 16]) < VIP_FILTER_BITS);
        }
    }

    #[test]
    fn neighbouring_addresses_get_different_bits() {
        let mut seen = [false; VIP_FILTER_BITS as usize];
        let mut collisions = 0;
        for low in 0..4096u32 {
            let bit = vip_filter_bit(&(0x0a60_0000 | low).to_be_bytes()) as usize;
            collisions += usize::from(seen[bit]);
            seen[bit] = true;
        }
        assert!(collisions < 300, "{collisions} of 4096 addresses collide");
    }

    #[test]
    fn scaled_hashes_cover_the_range_evenly() {
        let mut buckets = [0u32; 10];
        for i in 0..10_000u64 {
            buckets[scale(mix64(i) as u32, 10) as usize] += 1;
        }
        assert!(buckets.iter().all(|n| (850..1150).contains(n)), "{buckets:?}");
    }
}
