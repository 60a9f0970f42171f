//! The tests of this crate in one executable, since linking each of them alone takes longer than running it. A new file is named
//! here. kube_churn is an executable of its own: it measures the memory of its process.

mod evidence;
mod exclusion;
mod kube_api;
mod kube_elected;
mod kube_today;
mod kube_watch;
mod lab;
mod manifests;
mod systemd;
