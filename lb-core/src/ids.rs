//! Small integers for things with names: ids that live as long as their key, and runs of slots.

use std::collections::{BTreeMap, BTreeSet};

/// Hands out ids from 1 up; an id is given again only after it was released.
#[derive(Clone, Debug)]
pub struct IdPool {
    next: u32,
    limit: u32,
    free: BTreeSet<u32>,
}

impl IdPool {
    /// Ids `1..limit`.
    pub fn new(limit: u32) -> Self {
        Self { next: 1, limit, free: BTreeSet::new() }
    }

    /// An unused id, or `None` if all are taken.
    pub fn take(&mut self) -> Option<u32> {
        if let Some(id) = self.free.pop_first() {
            return Some(id);
        }
        (self.next < self.limit).then(|| {
            self.next += 1;
            self.next - 1
        })
    }

    /// Marks an id as taken that an earlier process gave; says whether it was free.
    pub fn reserve(&mut self, id: u32) -> bool {
        if id == 0 || id >= self.limit {
            return false;
        }
        if id < self.next {
            return self.free.remove(&id);
        }
        self.free.extend(self.next..id);
        self.next = id + 1;
        true
    }

    /// Ids up to a higher limit.
    pub fn extend(&mut self, limit: u32) {
        self.limit = self.limit.max(limit);
    }

    /// Gives an id back.
    pub fn release(&mut self, id: u32) {
        self.free.insert(id);
    }
}

/// Hands out runs of consecutive places, first fit.
#[derive(Clone, Debug)]
pub struct RangePool {
    len: u32,
    /// Free runs: first place → length. Neighbours are merged.
    free: BTreeMap<u32, u32>,
}

impl RangePool {
    /// Places `0..len`.
    pub fn new(len: u32) -> Self {
        Self { len, free: BTreeMap::from([(0, len)]) }
    }

    /// A run of `count` places (at least one), or `None` if no free run is long enough.
    pub fn take(&mut self, count: u32) -> Option<u32> {
        let (first, len) =
            self.free.iter().find(|(_, len)| **len >= count).map(|(first, len)| (*first, *len))?;
        self.free.remove(&first);
        if len > count {
            self.free.insert(first + count, len - count);
        }
        Some(first)
    }

    /// Marks a run as taken that an earlier process gave; says whether all of it was free.
    pub fn reserve(&mut self, first: u32, count: u32) -> bool {
        let Some((start, len)) = self.free.range(..=first).next_back().map(|(start, len)| (*start, *len))
        else {
            return false;
        };
        if start + len < first + count {
            return false;
        }
        self.free.remove(&start);
        if first > start {
            self.free.insert(start, first - start);
        }
        if start + len > first + count {
            self.free.insert(first + count, start + len - first - count);
        }
        true
    }

    /// More places behind the last.
    pub fn extend(&mut self, len: u32) {
        if len > self.len {
            self.release(self.len, len - self.len);
            self.len = len;
        }
    }

    /// Gives a run back.
    pub fn release(&mut self, first: u32, count: u32) {
        let (mut first, mut count) = (first, count);
        if let Some((before, len)) = self.free.range(..first).next_back().map(|(b, l)| (*b, *l))
            && before + len == first
        {
            self.free.remove(&before);
            (first, count) = (before, count + len);
        }
        if let Some(len) = self.free.remove(&(first + count)) {
            count += len;
        }
        self.free.insert(first, count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_reused_only_after_release() {
        let mut pool = IdPool::new(4);
        assert_eq!([pool.take(), pool.take(), pool.take(), pool.take()], [Some(1), Some(2), Some(3), None]);
        pool.release(2);
        assert_eq!((pool.take(), pool.take()), (Some(2), None));
    }

    #[test]
    fn reserved_ids_are_not_given_out() {
        let mut pool = IdPool::new(10);
        assert!(pool.reserve(3));
        assert!(!pool.reserve(3));
        assert_eq!([pool.take(), pool.take(), pool.take()], [Some(1), Some(2), Some(4)]);
        assert!(!pool.reserve(10), "out of range");
    }

    #[test]
    fn pools_grow_behind_their_end() {
        let (mut ids, mut runs) = (IdPool::new(2), RangePool::new(4));
        assert_eq!((ids.take(), ids.take(), runs.take(3), runs.take(2)), (Some(1), None, Some(0), None));
        ids.extend(3);
        runs.extend(6);
        assert_eq!((ids.take(), ids.take(), runs.take(3), runs.take(1)), (Some(2), None, Some(3), None));
    }

    #[test]
    fn runs_are_merged_when_released() {
        let mut pool = RangePool::new(10);
        let (a, b, c) = (pool.take(3).unwrap(), pool.take(3).unwrap(), pool.take(4).unwrap());
        assert_eq!((a, b, c, pool.take(1)), (0, 3, 6, None));
        pool.release(a, 3);
        pool.release(c, 4);
        assert_eq!(pool.take(5), None);
        pool.release(b, 3);
        assert_eq!(pool.take(10), Some(0));
    }

    #[test]
    fn reserving_splits_a_run() {
        let mut pool = RangePool::new(10);
        assert!(pool.reserve(4, 2));
        assert!(!pool.reserve(5, 2));
        assert_eq!((pool.take(5), pool.take(4), pool.take(4)), (None, Some(0), Some(6)));
    }
}
