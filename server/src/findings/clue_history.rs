//! The recent clues of one entity, pod, workload, service or node.
//!
//! What enters: clues, with the steps that each may be. What leaves: those that may be a step, the oldest first, without a look at
//! the others. What must hold: at most [`HISTORY_MAX`] clues; [`ClueHistory::present`] names the steps that they may be, and no
//! other.

use std::collections::VecDeque;
use std::collections::vec_deque::Iter;
use std::sync::Arc;

use super::clue_store::Noted;
use super::step_mask::StepMask;
use crate::correlate::clue::ClueKind;

/// Clues in one history.
pub const HISTORY_MAX: usize = 128;

/// A clue, and what is asked of it most, so that nobody has to look at it.
pub struct Slot {
    noted: Arc<Noted>,
    serial: u64,
    pid: u32,
    /// The place of its steps among [`ClueHistory::masks`].
    mask: u8,
    kind: ClueKind,
    /// True if the clue is about the process that leads its entity.
    is_led: bool,
}

const _: () = assert!(size_of::<Slot>() == 24 && HISTORY_MAX <= u128::BITS as usize);

/// Clues in the order of their arrival.
#[derive(Default)]
pub struct ClueHistory {
    slots: VecDeque<Slot>,
    /// The different sets of steps of its clues, and how many clues have each; a place without any is free.
    masks: Vec<(StepMask, u8)>,
    present: StepMask,
    /// When the latest clue was that had to make room, nanoseconds since 1970; 0 for none.
    forgotten_ns: u64,
}

impl ClueHistory {
    /// Clues in it.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// The steps that its clues may be.
    pub fn present(&self) -> &StepMask {
        &self.present
    }

    /// All clues.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Noted>> {
        self.into_iter()
    }

    /// The clues among the first `looked_at` that may be a step.
    pub fn may_be(&self, step: usize, looked_at: usize) -> impl Iterator<Item = &Arc<Noted>> {
        self.chosen(self.places(|mask| mask.contains(step)), looked_at)
    }

    /// The clues that may be one of these steps.
    pub fn may_be_one_of<'a>(&'a self, steps: &StepMask) -> impl Iterator<Item = &'a Arc<Noted>> + use<'a> {
        self.chosen(self.places(|mask| mask.intersects(steps)), HISTORY_MAX)
    }

    /// The places of [`ClueHistory::masks`] that are wanted, a bit each.
    fn places(&self, is_wanted: impl Fn(&StepMask) -> bool) -> u128 {
        let masks = self.masks.iter().enumerate();
        masks.fold(0, |places, (place, (mask, _))| places | u128::from(is_wanted(mask)) << place)
    }

    fn chosen(&self, places: u128, looked_at: usize) -> impl Iterator<Item = &Arc<Noted>> {
        let looked_at = if places == 0 { 0 } else { looked_at };
        let slots = self.slots.iter().take(looked_at);
        slots.filter(move |slot| places >> slot.mask & 1 != 0).map(|slot| &slot.noted)
    }

    /// The clues about a process that may be one of these steps.
    pub fn of_process<'a>(&'a self, pid: u32, steps: &StepMask) -> impl Iterator<Item = &'a Arc<Noted>> + use<'a> {
        let places = self.places(|mask| mask.intersects(steps));
        let slots = self.slots.iter().take(if places == 0 { 0 } else { HISTORY_MAX });
        slots.filter(move |slot| slot.pid == pid && places >> slot.mask & 1 != 0).map(|slot| &slot.noted)
    }

    /// The clues of a kind.
    pub fn of_kind(&self, kind: ClueKind) -> impl Iterator<Item = &Arc<Noted>> {
        self.slots.iter().filter(move |slot| slot.kind == kind).map(|slot| &slot.noted)
    }

    /// When the latest clue was that had to make room, nanoseconds since 1970; 0 for none. What came before is not all here.
    pub fn forgotten_ns(&self) -> u64 {
        self.forgotten_ns
    }

    /// The clue of a serial number.
    pub fn of_serial(&self, serial: u64) -> Option<&Arc<Noted>> {
        let place = self.slots.binary_search_by_key(&serial, |slot| slot.serial).ok()?;
        Some(&self.slots[place].noted)
    }

    /// Puts a clue where its serial number belongs: at the end, as a rule. There must be room.
    pub fn insert(&mut self, noted: Arc<Noted>) {
        let is_last = self.slots.back().is_none_or(|last| last.serial < noted.serial);
        let place = match is_last {
            true => self.slots.len(),
            false => self.slots.partition_point(|slot| slot.serial < noted.serial),
        };
        let slot = self.slot(noted);
        self.slots.insert(place, slot);
    }

    /// Puts a clue in the place of another. False where that one is not here.
    pub fn replace(&mut self, old: &Arc<Noted>, noted: &Arc<Noted>) -> bool {
        let Some(place) = self.slots.iter().position(|slot| Arc::ptr_eq(&slot.noted, old)) else { return false };
        // In this order: there is a place for the steps of every clue, and for no more.
        self.leave(self.slots[place].mask);
        self.slots[place] = self.slot(Arc::clone(noted));
        true
    }

    /// Takes a clue out.
    pub fn remove(&mut self, old: &Arc<Noted>) {
        if let Some(place) = self.slots.iter().position(|slot| Arc::ptr_eq(&slot.noted, old)) {
            self.remove_at(place);
        }
    }

    /// Takes the clue of a serial number out. False where it is not here.
    pub fn remove_serial(&mut self, serial: u64) -> bool {
        let place = self.slots.binary_search_by_key(&serial, |slot| slot.serial);
        place.is_ok_and(|place| {
            self.forget_at(place);
            true
        })
    }

    /// Takes one clue out of a full history: the oldest of the kind that there is most of, and of those one that is not about a
    /// container's first process. A pid namespace that is torn down ends hundreds of processes, before its first one is through with
    /// it; they must not push out what that one died of.
    pub fn make_room(&mut self) {
        let mut counts = [0_u16; ClueKind::ALL.len()];
        for slot in &self.slots {
            counts[slot.kind as usize] += 1;
        }
        let most = counts.iter().copied().max().unwrap_or(0);
        let is_common = |slot: &Slot| counts[slot.kind as usize] == most;
        let place = self.slots.iter().position(|slot| is_common(slot) && !slot.is_led);
        let place = place.or_else(|| self.slots.iter().position(is_common));
        self.forget_at(place.unwrap_or(0));
    }

    fn forget_at(&mut self, place: usize) {
        let at_ns = self.slots.get(place).map_or(0, |slot| slot.noted.clue.realtime_ns);
        self.forgotten_ns = self.forgotten_ns.max(at_ns);
        self.remove_at(place);
    }

    fn slot(&mut self, noted: Arc<Noted>) -> Slot {
        let mask = self.enter(&noted.mask);
        let is_led = noted.clue.pid != 0 && noted.clue.is_lead();
        Slot { serial: noted.serial, pid: noted.clue.pid, mask, kind: noted.clue.kind(), is_led, noted }
    }

    fn remove_at(&mut self, place: usize) {
        if let Some(slot) = self.slots.remove(place) {
            self.leave(slot.mask);
        }
    }

    fn enter(&mut self, mask: &StepMask) -> u8 {
        self.present.unite(mask);
        let known = self.masks.iter().position(|(known, _)| known == mask);
        let place = known.or_else(|| self.masks.iter().position(|(_, count)| *count == 0));
        let place = place.unwrap_or_else(|| {
            self.masks.push((*mask, 0));
            self.masks.len() - 1
        });
        self.masks[place].0 = *mask;
        self.masks[place].1 += 1;
        place as u8
    }

    fn leave(&mut self, place: u8) {
        let (left, count) = &mut self.masks[usize::from(place)];
        *count -= 1;
        if *count == 0 {
            // Nothing is one of these steps any more, and nobody finds it among those that are free.
            *left = StepMask::default();
            self.present = StepMask::default();
            self.masks.iter().for_each(|(mask, _)| self.present.unite(mask));
        }
    }
}

impl<'a> IntoIterator for &'a ClueHistory {
    type Item = &'a Arc<Noted>;
    type IntoIter = std::iter::Map<Iter<'a, Slot>, fn(&'a Slot) -> &'a Arc<Noted>>;

    fn into_iter(self) -> Self::IntoIter {
        self.slots.iter().map(|slot| &slot.noted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tapio_wire::event::Role;

    use crate::correlate::clue::{Clue, ClueDetail, EvidenceId, Exec, NsPid};
    use crate::correlate::{EntityInfo, NodeRef};

    fn noted(serial: u64, steps: &[usize]) -> Arc<Noted> {
        let node = NodeRef::named("n");
        let mut mask = StepMask::default();
        steps.iter().for_each(|&step| mask.insert(step));
        let clue = Clue {
            entity: Arc::new(EntityInfo::unknown(&node, 7)),
            pid: (serial % 3) as u32,
            boottime_ns: serial,
            realtime_ns: serial,
            evidence: EvidenceId { node: node.id, epoch: 1, seq: serial, index: 0 },
            detail: ClueDetail::Exec(Exec {
                comm: "x".into(),
                parent_pid: 0,
                ns: NsPid { pid: 1, level: 0 },
                role: Role::Unknown,
            }),
        };
        Arc::new(Noted { clue, mask, serial })
    }

    #[test]
    fn the_index_finds_the_same_steps_as_a_full_scan() {
        let (mut history, mut all, mut random) = (ClueHistory::default(), Vec::<Arc<Noted>>::new(), 1_u64);
        for serial in 1..4_000_u64 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let pick = (random >> 33) as usize;
            // More different sets of steps than a history has places.
            let steps = [pick % 64, 64 + pick / 64 % 9, 200 + pick % 5];
            let new = noted(serial, &steps[..pick % 4 % 3 + usize::from(pick.is_multiple_of(7))]);
            match pick % 10 {
                0 if !all.is_empty() => history.remove(&all.remove(pick / 10 % all.len())),
                1 if !all.is_empty() => {
                    let place = pick / 10 % all.len();
                    let new = noted(all[place].serial, &steps);
                    assert!(history.replace(&all[place], &new));
                    all[place] = new;
                }
                2 if !all.is_empty() => {
                    let old = all.remove(pick / 10 % all.len());
                    assert!(history.remove_serial(old.serial) && !history.remove_serial(old.serial));
                }
                _ => {
                    if all.len() == HISTORY_MAX {
                        // All are of one kind, and none leads its entity but those with a pid.
                        history.make_room();
                        let gone = all.iter().position(|one| one.clue.pid == 0).unwrap_or(0);
                        all.remove(gone);
                    }
                    history.insert(Arc::clone(&new));
                    all.push(new);
                }
            }
            let is_same = |found: Vec<&Arc<Noted>>, wanted: Vec<&Arc<Noted>>| {
                found.len() == wanted.len() && found.iter().zip(&wanted).all(|(a, b)| Arc::ptr_eq(a, b))
            };
            let mut present = StepMask::default();
            all.iter().for_each(|one| present.unite(&one.mask));
            assert_eq!(*history.present(), present);
            assert!(is_same(history.iter().collect(), all.iter().collect()));
            let of_step = |one: &&Arc<Noted>| one.mask.contains(steps[1]);
            assert!(is_same(history.may_be(steps[1], HISTORY_MAX).collect(), all.iter().filter(of_step).collect()));
            let of_first: Vec<_> = all.iter().take(5).filter(of_step).collect();
            assert!(is_same(history.may_be(steps[1], 5).collect(), of_first));
            let mut wanted = StepMask::default();
            steps.iter().for_each(|&step| wanted.insert(step));
            let one_of = |one: &&Arc<Noted>| one.mask.intersects(&wanted);
            assert!(is_same(history.may_be_one_of(&wanted).collect(), all.iter().filter(one_of).collect()));
            let of_process: Vec<_> = all.iter().filter(one_of).filter(|one| one.clue.pid == 2).collect();
            assert!(is_same(history.of_process(2, &wanted).collect(), of_process));
        }
        assert!(history.len() > 100, "{}", history.len());
    }
}
