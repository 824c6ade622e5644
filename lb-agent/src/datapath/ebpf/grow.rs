//! Larger maps, while the programs serve: new maps are filled beside the present ones, then programs that use them are put
//! into every hook.
//!
//! Ids, slots and generations stay, so flows go on; packets meet the old programs and maps or the new ones, and both say
//! the same. Flow tables, counters and facts about the node are shared. Nothing is written to the old maps meanwhile: who
//! writes them is who lets them grow. Pins change last. An agent that is killed on the way leaves pins that lead to either
//! maps, with the same entries, and links that the next agent puts its own programs into.

use std::sync::{Arc, Mutex, PoisonError};

use super::{
    attach::Attacher,
    load::{Generation, Loader},
    maps::Maps,
    plan::{Actual, Op},
    sizes::Capacity,
};
use crate::datapath::DatapathError;

/// What it takes to let maps grow.
pub struct Growth {
    loader: Loader,
    attacher: Arc<Mutex<Attacher>>,
    /// No map gets more entries.
    most: u32,
}

impl Growth {
    /// Programs come from `loader` and go where those of `attacher` are.
    pub fn new(loader: Loader, attacher: Arc<Mutex<Attacher>>, most: u32) -> Self {
        Self { loader, attacher, most }
    }

    /// The most entries that a map may have.
    pub fn most(&self) -> u32 {
        self.most
    }

    /// Maps as large as wanted with all that `maps` hold, and programs that use them in the place of the present ones;
    /// `None` if they may not be any larger. After an error nothing has changed.
    pub fn grow(&mut self, maps: &Maps, wanted: Capacity) -> Result<Option<Maps>, DatapathError> {
        let capacity = maps.capacity().or_larger(wanted.at_most(self.most));
        if capacity == maps.capacity() {
            return Ok(None);
        }
        let pins = self.loader.pins().clone();
        let put_in = || {
            let programs = self.loader.load(capacity, Generation::Next)?;
            let mut larger = Maps::open(&pins, Generation::Next)?;
            copies(&maps.read()?).iter().try_for_each(|op| larger.write(op))?;
            self.attacher.lock().unwrap_or_else(PoisonError::into_inner).replace(programs)?;
            Ok(larger)
        };
        let larger = put_in().inspect_err(|_: &DatapathError| pins.forget_next())?;
        pins.promote_next()?;
        Ok(Some(larger))
    }
}

/// The writes that make the same of empty maps.
fn copies(actual: &Actual) -> Vec<Op> {
    let backends = actual.backends.iter().map(|((family, id), backend)| Op::Backend(*family, *id, *backend));
    let slots = actual.slots.iter().map(|(slot, id)| Op::Slots(*slot, vec![*id]));
    let ranges = actual.source_ranges.iter().map(|(id, net)| Op::SourceRange(*id, *net));
    let vips = actual.vips.iter().map(|(addr, kind)| Op::Vip(*addr, *kind));
    let frontends = actual.frontends.iter().map(|(addr, value)| Op::Frontend(*addr, *value));
    backends.chain(slots).chain(ranges).chain(vips).chain(frontends).collect()
}
