//! What is said where nothing is known.

use super::*;

#[test]
fn a_node_that_is_only_connected_is_named_as_connected() {
    let node = |name: &str, connected: bool, has_sent: bool| NodeStatus {
        node: name.into(),
        connected,
        epochs: if has_sent { vec![tapio_wire::service::EpochStatus::default()] } else { Vec::new() },
        ..NodeStatus::default()
    };
    assert!(known_nodes(&[]).contains("no collector has connected"));
    assert_eq!(known_nodes(&[node("n1", false, true)]), "events have come from n1");
    let both = known_nodes(&[node("n1", true, true), node("n2", true, false)]);
    assert!(both.contains("come from n1; connected, with 0 events sent so far: n2 ("), "{both}");
}
