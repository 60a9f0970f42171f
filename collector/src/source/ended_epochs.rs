//! Writes an event for each epoch that ended while the process went on.
//!
//! In: ends, from `outbox/epochs.rs`. Out: a `Gap` event of the node for each. What must hold: after the sources have stopped no event is
//! added, since the last frame states the final counters.

use std::sync::Arc;

use tapio_wire::event::{Detail, EntityId, Event, Gap, Lane, Source};
use tokio::sync::watch;

use crate::base::clock::boottime_ns;
use crate::intake::Intake;
use crate::intake::decode::Batch;
use crate::outbox::epochs::{EndedEpoch, EndedEpochs};

/// Writes an event for each ended epoch, until the sources have stopped and the intake is empty. `node` is the node's entity.
pub async fn run(ended: Arc<EndedEpochs>, node: EntityId, mut intake: Intake, mut stopped: watch::Receiver<bool>) {
    loop {
        let mut pass = intake.begin();
        while pass.room_of(Lane::Lethal) > 0
            && let Some(ended) = ended.next()
        {
            pass.observe(|batch, _| gap(&ended, node, batch));
        }
        pass.finish_all();
        let pause = if intake.is_empty() { None } else { Some(intake.sleep_limit()) };
        tokio::select! {
            _ = stopped.wait_for(|&stopped| stopped) => break,
            () = ended.changed() => {}
            // A batch that found no room.
            () = tokio::time::sleep(pause.unwrap_or_default()), if pause.is_some() => {}
        }
    }
    while let Some(pause) = intake.hand_on() {
        tokio::time::sleep(pause).await;
    }
}

fn gap(ended: &EndedEpoch, node: EntityId, batch: &mut Batch) -> Event {
    // Frames of an earlier boot have that boot's times.
    let now = boottime_ns();
    let until_ns = ended.until_ns.min(now);
    Event {
        time_ns: now,
        entity: node,
        pid: 0,
        source: Source::Collector,
        body: Detail::Gap(Box::new(Gap {
            what: batch.text("frames"),
            reason: batch.text(ended.cause.text()),
            from_ns: ended.from_ns.min(until_ns),
            until_ns,
            found_gone: u32::try_from(ended.events).unwrap_or(u32::MAX),
        })),
    }
}
