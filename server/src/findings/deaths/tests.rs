use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use tapio_wire::event::Role;

use super::{Deaths, Explanation, Former, finding_id};
use crate::correlate::clue::{Clue, ClueDetail, EvidenceId, Exec, NsPid};
use crate::correlate::{EntityInfo, NodeRef};
use crate::findings::PatternSet;
use crate::findings::clue_store::{ClueStore, Noted};
use crate::findings::pattern::Pattern;
use crate::findings::step_mask::StepMask;

const MINUTE: u64 = 60_000_000_000;

fn patterns() -> PatternSet {
    let text = |id: &str, priority: u32, count: &str| {
        format!(
            "id: {id}\ntitle: t\nsummary: s\nseverity: low\npriority: {priority}\nwindow: 10m\nscope: pod\nanchor: exit\n\
             confidence: {{base: 0.9}}\nsteps:\n  - name: exit\n    clue: exit\n{count}advice: []\n"
        )
    };
    let counts = "    count: {min: 3}\n";
    let of_one = format!("    same: {{container: exit.container}}\n{counts}");
    let texts =
        [text("alone", 100, ""), text("alike", 500, ""), text("counted", 300, counts), text("of-one", 300, &of_one)];
    let files: Vec<(&str, &str)> =
        ["a.yaml", "b.yaml", "c.yaml", "d.yaml"].into_iter().zip(texts.iter().map(|t| &**t)).collect();
    PatternSet::from_texts(&files).expect("valid")
}

fn place_of(patterns: &PatternSet, id: &str) -> usize {
    patterns.patterns().iter().position(|pattern| pattern.id == id).expect("a pattern")
}

/// A clue with a sequence number of its own, at a time since boot and since 1970 alike.
pub(in crate::findings) fn death(seq: u64, at_ns: u64) -> Arc<Noted> {
    death_of(7, seq, at_ns)
}

fn death_of(entity: u64, seq: u64, at_ns: u64) -> Arc<Noted> {
    let node = NodeRef::named("n");
    let clue = Clue {
        entity: Arc::new(EntityInfo::unknown(&node, entity)),
        pid: 1,
        boottime_ns: at_ns,
        realtime_ns: at_ns,
        evidence: EvidenceId { node: node.id, epoch: 1, seq, index: 0 },
        detail: ClueDetail::Exec(Exec {
            comm: "x".into(),
            parent_pid: 0,
            ns: NsPid { pid: 1, level: 0 },
            role: Role::Unknown,
        }),
    };
    ClueStore::new(1).note(clue, StepMask::default(), &[])
}

/// What stands: by id the count, the last death, and when the first was.
type Standing = BTreeMap<String, (u32, u64, Option<u64>)>;

/// Deaths, with what somebody who watches has seen published and withdrawn.
struct Watched {
    patterns: PatternSet,
    deaths: Deaths,
    standing: Standing,
    /// What an earlier run found, each with its last death.
    formers: Vec<(Former, EvidenceId)>,
    has_restarted: bool,
    /// What happened before this moment, nanoseconds since 1970, may come again.
    sent_again_ns: u64,
}

impl Watched {
    fn new() -> Self {
        Self {
            patterns: patterns(),
            deaths: Deaths::default(),
            standing: Standing::new(),
            formers: Vec::new(),
            has_restarted: false,
            sent_again_ns: 0,
        }
    }

    /// `kind`: nothing, alone, alike, or counted with the deaths of the ten minutes before.
    fn settle(&mut self, death: &Arc<Noted>, kind: u32, all: &[Arc<Noted>]) {
        let in_window = |other: &&Arc<Noted>| {
            other.clue.boottime_ns <= death.clue.boottime_ns
                && death.clue.boottime_ns - other.clue.boottime_ns <= 10 * MINUTE
        };
        let counted = || all.iter().filter(in_window).cloned().collect();
        let best = match kind {
            0 => None,
            1 => Some(("alone", Explanation::Alone)),
            2 => Some(("alike", Explanation::Alike { workload: 9 })),
            4 => Some(("of-one", Explanation::Counted { scope: 5, deaths: counted() })),
            _ => Some(("counted", Explanation::Counted { scope: 5, deaths: counted() })),
        };
        let settled = match best {
            None => self.deaths.settle(death, None),
            Some((id, explanation)) => {
                let place = place_of(&self.patterns, id);
                let pattern: &Pattern = &self.patterns.patterns()[place];
                self.deaths.settle(death, Some((place, pattern, explanation)))
            }
        };
        let mut settled = settled;
        for of in std::mem::take(&mut settled.publish) {
            let is_its = |(former, last): &&(Former, EvidenceId)| {
                (*former.id != *of.id || former.count > of.count)
                    && of.members.iter().any(|death| death.clue.evidence == *last)
            };
            let former = self.formers.iter().find(is_its);
            let sent_again_ns = self.sent_again_ns;
            let adopted = former
                .and_then(|(former, last)| Some((former, self.deaths.adopt(&of, former, (*last, sent_again_ns))?)));
            match adopted {
                Some((former, adopted)) => settled.replace(&of, former, adopted),
                None => settled.publish.push(of),
            }
        }
        for of in settled.publish {
            let known = self.standing.get(&of.id).filter(|known| known.0 > of.count && self.has_restarted);
            let new = (of.count, of.last.clue.evidence.seq, of.started_realtime_ns);
            let new = known.copied().unwrap_or(new);
            self.standing.insert(of.id, new);
        }
        for withdrawn in settled.withdrawn {
            let gone = self.standing.remove(&withdrawn.id);
            assert!(gone.is_some() || self.has_restarted, "only what stands is withdrawn");
            let successor = withdrawn.successor.as_ref();
            assert!(successor.is_none_or(|successor| self.standing.contains_key(successor)), "{withdrawn:?}");
        }
    }
}

#[test]
fn what_stands_does_not_depend_on_the_order() {
    for seed in 0..400 {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut all: Vec<Arc<Noted>> = (0..10).map(|seq| death(seq, random.u64(0..60) * MINUTE)).collect();
        let kinds: Vec<u32> = all.iter().map(|_| random.u32(0..4)).collect();
        all.sort_by_key(|death| (death.clue.boottime_ns, death.clue.evidence));
        let kind_of = |death: &Arc<Noted>| kinds[death.clue.evidence.seq as usize];
        let mut in_order = Watched::new();
        for death in &all {
            in_order.settle(death, kind_of(death), &all);
        }
        let mut shuffled = Watched::new();
        // What was believed of them meanwhile does not matter.
        for _ in 0..random.usize(0..30) {
            let death = &all[random.usize(0..all.len())];
            shuffled.settle(death, random.u32(0..4), &all);
        }
        let mut order = all.clone();
        random.shuffle(&mut order);
        for death in &order {
            shuffled.settle(death, kind_of(death), &all);
        }
        assert_eq!(shuffled.standing, in_order.standing, "seed {seed}");
    }
}

#[test]
fn a_death_that_is_explained_otherwise_leaves_its_group() {
    let mut watched = Watched::new();
    let all = [death(1, MINUTE), death(2, 2 * MINUTE)];
    watched.settle(&all[0], 2, &all);
    let alone = watched.standing.keys().next().cloned().expect("one");
    watched.settle(&all[1], 2, &all);
    let counts: Vec<u32> = watched.standing.values().map(|of| of.0).collect();
    assert_eq!(counts, [2]);
    watched.settle(&all[1], 1, &all);
    let node = all[1].clue.evidence.node;
    let other = finding_id("death", 7, EvidenceId { node, epoch: 1, seq: 2, index: 0 });
    let expected = [(alone, (1, 1, None)), (other, (1, 2, None))];
    assert_eq!(watched.standing, expected.into_iter().collect());
}

#[test]
fn a_long_loop_looked_at_again_stays_one_finding() {
    let mut watched = Watched::new();
    let all: Vec<_> = (0..100).map(|seq| death(seq, seq * 2 * MINUTE)).collect();
    for death in &all {
        watched.settle(death, 2, &all);
    }
    let before = watched.standing.clone();
    assert_eq!(before.values().map(|of| of.0).collect::<Vec<_>>(), [100]);
    for death in all.iter().rev() {
        watched.settle(death, 2, &all);
    }
    assert_eq!(watched.standing, before);
}

#[test]
fn many_deaths_in_any_order_are_the_same_findings() {
    for seed in 0..100 {
        let mut random = fastrand::Rng::with_seed(seed);
        let all: Vec<_> = (0..60).map(|seq| death(seq, random.u64(0..180) * MINUTE)).collect();
        let mut in_order = all.clone();
        in_order.sort_by_key(|death| (death.clue.boottime_ns, death.clue.evidence));
        let mut shuffled = all;
        random.shuffle(&mut shuffled);
        let [first, second] = [in_order, shuffled].map(|order| {
            let mut watched = Watched::new();
            order.iter().for_each(|death| watched.settle(death, 2, &order));
            watched.standing
        });
        assert_eq!(second, first, "seed {seed}");
        assert_eq!(first.values().map(|of| of.0).sum::<u32>(), 60, "seed {seed}");
    }
}

#[test]
fn earlier_findings_stand_however_many_deaths_follow() {
    let mut watched = Watched::new();
    let all: Vec<_> = (0..40).map(|seq| death(seq, seq * 60 * MINUTE + seq % 2 * 55 * MINUTE)).collect();
    for death in &all {
        watched.settle(death, 2, &all);
    }
    let counts: Vec<u32> = watched.standing.values().map(|of| of.0).collect();
    assert_eq!(counts.iter().sum::<u32>(), 40, "{counts:?}");
}

#[test]
fn earlier_counts_stand_however_many_deaths_follow() {
    let mut watched = Watched::new();
    let all: Vec<_> = (0..60).map(|seq| death(seq, seq / 20 * 60 * MINUTE + seq % 20 * MINUTE)).collect();
    for (place, death) in all.iter().enumerate() {
        watched.settle(death, 3, &all[..=place]);
    }
    let counts: Vec<u32> = watched.standing.values().map(|of| of.0).collect();
    assert_eq!(counts, [20; 3]);
}

#[test]
fn a_long_count_of_deaths_goes_on_with_its_first() {
    let mut watched = Watched::new();
    let all: Vec<_> = (0..100).map(|seq| death(seq, seq * 2 * MINUTE)).collect();
    for (place, death) in all.iter().enumerate() {
        watched.settle(death, if place < 2 { 1 } else { 3 }, &all[..=place]);
    }
    let expected = finding_id("counted", 5, all[0].clue.evidence);
    assert_eq!(watched.standing, [(expected, (100, 99, Some(0)))].into_iter().collect());
}

#[test]
fn a_restart_changes_no_finding_of_several_deaths() {
    for seed in 0..300 {
        let mut random = fastrand::Rng::with_seed(seed);
        let kind = if seed % 2 == 0 { 2 } else { 3 };
        let mut times: Vec<u64> = (0..80).map(|_| random.u64(0..400) * MINUTE).collect();
        times.sort_unstable();
        let all: Vec<_> = times.into_iter().zip(1..).map(|(at, seq)| death(seq, at)).collect();
        let run = |watched: &mut Watched, places: std::ops::Range<usize>, known_from: usize| {
            for place in places {
                watched.settle(&all[place], kind, &all[known_from..=place]);
            }
        };
        let stopped = random.usize(1..all.len());
        let mut first = Watched::new();
        run(&mut first, 0..stopped, 0);
        let replayed_ns = all[stopped - 1].clue.realtime_ns.saturating_sub(30 * MINUTE);
        let from = all.iter().position(|death| death.clue.realtime_ns >= replayed_ns).expect("one");

        let mut again = Watched::new();
        (again.standing, again.has_restarted) = (first.standing.clone(), true);
        // What is replayed of several nodes comes in any order.
        let mut replayed: Vec<usize> = (from..stopped).collect();
        if seed % 3 > 0 {
            random.shuffle(&mut replayed);
        }
        for place in replayed {
            again.settle(&all[place], kind, &all[from..=place]);
        }
        for (id, &(count, last, started)) in first.standing.iter().filter(|(_, of)| of.0 > 1) {
            let place = last as usize - 1;
            let started_ns = started.expect("a group has a beginning");
            let former = Former { id: id.as_str().into(), count, started_ns };
            again.formers = vec![(former, all[place].clue.evidence)];
            if place >= from {
                again.settle(&all[place], kind, &all[from..=place]);
            }
        }
        run(&mut again, stopped..all.len(), from);
        run(&mut first, stopped..all.len(), 0);
        assert_eq!(again.standing, first.standing, "seed {seed}, stopped at {stopped}, replayed from {from}");
    }
}

/// NATS has lost everything, or what is older than some moment: this server knows some of the deaths at once, and others send the
/// rest again later.
#[test]
fn what_comes_again_after_a_lost_log_counts_once() {
    for seed in 0..600 {
        let mut random = fastrand::Rng::with_seed(seed);
        // Of two containers of a pod each has its own series; those of a workload have one together.
        let (kind, containers) = [(2, 1), (3, 1), (3, 4), (4, 2)][seed as usize % 4];
        let mut at = 0;
        let times = (0..60).map(|_| {
            at += random.u64(1..3) * MINUTE;
            at
        });
        let all: Vec<_> = times.zip(1..).map(|(at, seq)| death_of(seq % containers, seq, at)).collect();
        let stopped = random.usize(2..all.len());
        let is_same = |one: usize, other: usize| kind != 4 || all[one].clue.entity.id == all[other].clue.entity.id;
        let known = |places: &BTreeSet<usize>, to: usize| -> Vec<Arc<Noted>> {
            places.range(..=to).filter(|place| is_same(**place, to)).map(|place| Arc::clone(&all[*place])).collect()
        };
        let every: BTreeSet<usize> = (0..all.len()).collect();
        let mut first = Watched::new();
        (0..stopped).for_each(|place| first.settle(&all[place], kind, &known(&every, place)));

        let mut again = Watched::new();
        (again.standing, again.has_restarted) = (first.standing.clone(), true);
        // The archive of this one has the last death, and what is sent again may be older than what it replays.
        let from = random.usize(0..stopped - 1);
        let begins = if seed % 8 < 4 { stopped } else { from.max(1) + random.usize(0..=stopped - from.max(1)) };
        let is_lasting = |place: usize| place >= begins || place + containers as usize >= stopped;
        let is_all_lost = begins == stopped;
        let (mut own, mut late): (Vec<usize>, Vec<usize>) =
            (from..stopped).partition(|place| is_lasting(*place) || is_all_lost && random.bool());
        let of_log = || own.iter().map(|place| all[*place].clue.realtime_ns);
        again.sent_again_ns = if is_all_lost { u64::MAX } else { of_log().min().unwrap_or(u64::MAX) };
        random.shuffle(&mut own);
        random.shuffle(&mut late);
        let mut places = BTreeSet::new();
        let take = |again: &mut Watched, places: &mut BTreeSet<usize>, new: usize| {
            places.insert(new);
            // It is looked again at what counts it.
            for place in places.range(new..).copied().collect::<Vec<_>>() {
                again.settle(&all[place], kind, &known(places, place));
            }
        };
        own.into_iter().for_each(|place| take(&mut again, &mut places, place));
        for (id, &(count, last, started)) in first.standing.iter().filter(|(_, of)| of.0 > 1) {
            let started_ns = started.expect("a group has a beginning");
            let last = all[last as usize - 1].clue.evidence;
            again.formers.push((Former { id: id.as_str().into(), count, started_ns }, last));
        }
        for place in (0..stopped).rev().take(containers as usize) {
            again.settle(&all[place], kind, &known(&places, place));
        }
        late.into_iter().for_each(|place| take(&mut again, &mut places, place));
        for (place, death) in all.iter().enumerate().skip(stopped) {
            take(&mut again, &mut places, place);
            first.settle(death, kind, &known(&every, place));
        }
        // The store holds back what is a part of an earlier run's finding.
        again.standing.retain(|id, of| of.1 > stopped as u64 || first.standing.contains_key(id));
        assert_eq!(again.standing, first.standing, "seed {seed}, stopped at {stopped}, sent again from {from}");
    }
}

/// The log is whole, and begins within the series: a death that arrives late is not one that the earlier run has counted.
#[test]
fn a_new_late_death_counts_after_a_restart() {
    for kind in [2, 3] {
        let all: Vec<_> = (1..=30).map(|seq| death(seq, seq * MINUTE)).collect();
        let (begins, late) = (10, 24);
        let known = |places: &BTreeSet<usize>, to: usize| -> Vec<Arc<Noted>> {
            places.range(..=to).map(|place| Arc::clone(&all[*place])).collect()
        };
        let take = |of: &mut Watched, places: &mut BTreeSet<usize>, new: usize| {
            places.insert(new);
            for place in places.range(new..).copied().collect::<Vec<_>>() {
                of.settle(&all[place], kind, &known(places, place));
            }
        };
        let (mut first, mut places) = (Watched::new(), BTreeSet::new());
        (0..all.len()).filter(|place| *place != late).for_each(|place| take(&mut first, &mut places, place));
        let (mut again, mut read) = (Watched::new(), BTreeSet::new());
        (again.standing, again.has_restarted) = (first.standing.clone(), true);
        again.sent_again_ns = all[begins].clue.realtime_ns;
        (begins..all.len()).filter(|place| *place != late).for_each(|place| take(&mut again, &mut read, place));
        for (id, &(count, last, started)) in &first.standing {
            let former =
                Former { id: id.as_str().into(), count, started_ns: started.expect("a group has a beginning") };
            again.formers.push((former, all[last as usize - 1].clue.evidence));
        }
        again.settle(&all[29], kind, &known(&read, 29));
        take(&mut first, &mut places, late);
        take(&mut again, &mut read, late);
        again.standing.retain(|id, _| first.standing.contains_key(id));
        assert_eq!(again.standing, first.standing, "{kind}");
        assert!(first.standing.values().any(|of| of.0 == 30), "{:?}", first.standing);
    }
}

#[test]
fn groups_of_one_series_keep_each_their_count() {
    let mut watched = Watched::new();
    let second = MINUTE / 60;
    let slow: Vec<_> = (1..=4).map(|seq| death(seq, if seq < 4 { seq * 30 * second } else { 6 * MINUTE })).collect();
    let fast: Vec<_> = (0..20).map(|place| death(10 + place, (130 + 10 * place) * second)).collect();
    for place in 0..3 {
        watched.settle(&slow[place], 3, &slow[..=place]);
    }
    for place in 0..fast.len() {
        watched.settle(&fast[place], 3, &fast[..=place]);
    }
    watched.settle(&slow[3], 3, &slow);
    let counts: Vec<u32> = watched.standing.values().map(|of| of.0).collect();
    assert_eq!((counts.len(), counts.iter().min(), counts.iter().max()), (2, Some(&4), Some(&20)), "{counts:?}");
}
