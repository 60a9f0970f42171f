//! The tests of this crate in one executable, since linking each of them alone takes longer than running it. A new file is named
//! here. hostile_http2 is an executable of its own: it measures the memory of its process.

mod api_http;
mod archive_chaos;
mod archive_copy;
mod archive_disks;
mod archive_elsewhere;
mod archive_faults;
mod archive_read;
mod archive_recovery;
mod archive_retention;
mod archive_support;
mod auth;
mod cluster_faults;
mod cluster_leader;
mod cluster_log;
mod cluster_support;
mod cluster_whole;
mod correlate_alive;
mod correlate_engine;
mod correlate_gone;
mod correlate_node;
mod correlate_patterns;
mod correlate_patterns_kube;
mod correlate_patterns_node;
mod correlate_states;
mod correlate_truth;
mod descriptors;
mod ingest_limits;
mod ingest_streams;
mod manifests;
mod reconnect_storm;
mod server_services;
mod tapioctl_output;
mod vitals;
mod whole_server;
