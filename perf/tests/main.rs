//! The tests of this crate in one executable, since linking each of them alone takes longer than running it. A new file is named
//! here. A test takes its turn by `lab::alone` or `lab::beside`.

mod backup;
mod bad_input;
mod collector_killed;
mod connection_age;
mod conntrack;
mod docs;
mod end_to_end;
mod endpoints;
mod evidence;
mod flood;
mod governor;
mod inject;
mod kube;
mod kube_archive;
mod kube_capabilities;
mod kube_cluster;
mod kube_node;
mod kube_production;
mod kube_rollout;
mod kube_states;
mod kube_truth;
mod lab;
mod monitoring;
mod network_faults;
mod records;
mod reference;
mod server_disk;
mod server_killed;
mod small_ring;
mod spool;
mod spool_damage;
mod storm;
mod tls;
mod troubles;
mod truth;
