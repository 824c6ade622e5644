//! Room for reports that wait for the programming thread, which may be busy for minutes with rules of a large cluster.

use std::sync::Arc;

use lb_core::model::Event;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::source::Report;

/// Objects and endpoints that may wait, some hundred bytes each. What has no room is not read: the API server keeps it, or
/// ends the watch and tells all anew.
const ROOM: u32 = 200_000;

/// What waits takes no more memory than this.
#[derive(Clone, Debug)]
pub struct Room(Arc<Semaphore>);

/// A report's place; whoever drops it makes room for others.
#[derive(Debug)]
pub struct Place(#[expect(dead_code, reason = "it is dropped")] OwnedSemaphorePermit);

impl Default for Room {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(ROOM as usize)))
    }
}

impl Room {
    /// Waits for a place for a report, if there is one.
    pub async fn place(&self, report: Option<&Report>) -> Option<Place> {
        self.0.clone().acquire_many_owned(size(report?)).await.ok().map(Place)
    }
}

/// How much room a report needs. One that is larger than all of it is let in alone.
fn size(report: &Report) -> u32 {
    let of = |event: &Event| match event {
        Event::EndpointSlice(slice) => 1 + slice.endpoints.len(),
        _ => 1,
    };
    match report {
        Report::Changed(events) => {
            u32::try_from(events.iter().map(of).sum::<usize>()).map_or(ROOM, |size| size.min(ROOM))
        }
        Report::Synced | Report::Warnings(..) => 1,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use lb_core::synthetic;
    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn what_has_no_room_waits_until_something_was_taken() {
        let room = Room::default();
        let slices =
            |endpoints| Report::Changed(vec![Event::EndpointSlice(synthetic::slice(1, endpoints, 0))]);
        assert!(room.place(None).await.is_none());
        assert_eq!(size(&slices(10)), 11);
        assert_eq!(size(&Report::Synced), 1);
        let all = Report::Changed(vec![Event::EndpointSlice(synthetic::slice(1, 1_000, 0)); 300]);
        assert_eq!(size(&all), ROOM);
        let mut places = Vec::new();
        while let Ok(place) = timeout(Duration::from_millis(20), room.place(Some(&slices(999)))).await {
            places.push(place);
        }
        assert_eq!(places.len(), 200);
        let waiting = tokio::spawn(async move { room.place(Some(&all)).await });
        places.clear();
        timeout(Duration::from_secs(10), waiting).await.expect("there is room").unwrap().expect("a place");
    }
}
