use super::*;

fn write(folder: &Path, files: &[(&str, &str)]) {
    std::fs::create_dir_all(folder).expect("a folder");
    for (name, text) in files {
        std::fs::write(folder.join(name), text).expect("a file");
    }
}

#[test]
fn a_version_2_cgroup_is_read_with_its_limiting_parents() {
    let root = tempfile::tempdir().expect("a folder");
    let pod = root.path().join("kubepods.slice/pod1.slice");
    write(&pod, &[("memory.max", "200\n"), ("memory.current", "150\n")]);
    write(&root.path().join("kubepods.slice"), &[("memory.max", "max\n"), ("pids.max", "max\n")]);
    write(
        &pod.join("c.scope"),
        &[
            ("memory.max", "100\n"),
            ("memory.current", "99\n"),
            ("memory.peak", "100\n"),
            ("memory.events", "low 0\nhigh 0\nmax 7\noom 1\noom_kill 1\noom_group_kill 0\n"),
            ("memory.pressure", "some avg10=2.00 avg60=0.00 total=1\nfull avg10=1.25 avg60=0.00 avg300=0.00 total=9\n"),
            ("memory.stat", "anon 60\nfile 30\nkernel 9\nshmem 5\n"),
            ("pids.current", "3\n"),
            ("pids.max", "max\n"),
            ("cpu.stat", "usage_usec 5\nnr_periods 3\nnr_throttled 2\nthrottled_usec 400\n"),
        ],
    );
    let mounts = Mounts { version_2: Some(root.path().into()), ..Mounts::default() };
    let readings = mounts.read_at(&ProcessPaths::of("", "/kubepods.slice/pod1.slice/c.scope", false));
    let own = Reading {
        path: "/kubepods.slice/pod1.slice/c.scope".into(),
        memory_limit_bytes: 100,
        memory_usage_bytes: 99,
        memory_peak_bytes: 100,
        oom_kills: 1,
        limit_hits: 7,
        pids: 3,
        pids_limit: u64::MAX,
        throttled: 2,
        throttled_us: 400,
        memory_pressure: 125,
        memory: Breakdown { anon: 60, file: 25, shmem: 5, kernel: 9 },
        periods: 3,
        height: 0,
        folder: pod.join("c.scope"),
    };
    assert_eq!(readings[0], own);
    assert_eq!((&*readings[1].path, readings[1].memory_limit_bytes), ("/kubepods.slice/pod1.slice", 200));
    assert_eq!(readings.len(), 2, "what limits nothing is left out");
}

#[test]
fn the_biggest_below_a_full_cgroup_are_listed_with_limits() {
    let root = tempfile::tempdir().expect("a folder");
    let own = format!("{}\n", std::process::id());
    for (path, usage, limit) in [("pod1/a", "10", "max"), ("pod1/b", "30", "40"), ("pod2/c", "20", "max")] {
        let files = [("cgroup.procs", &*own), ("memory.current", usage), ("memory.max", limit)];
        write(&root.path().join(path), &files);
    }
    let found: Vec<_> = members(root.path()).into_iter().map(|m| (m.path, m.usage_bytes, m.limit_bytes)).collect();
    let expected = [("pod1/b", 30, 40), ("pod2/c", 20, 0), ("pod1/a", 10, 0)];
    assert_eq!(found, expected.map(|(path, usage, limit)| (path.to_owned(), usage, limit)));
}

#[test]
fn a_cgroup_of_version_1_is_read_in_each_hierarchy() {
    let root = tempfile::tempdir().expect("a folder");
    let (memory, cpu) = (root.path().join("memory"), root.path().join("cpu"));
    write(
        &memory.join("box"),
        &[
            ("memory.limit_in_bytes", "100\n"),
            ("memory.usage_in_bytes", "98\n"),
            ("memory.max_usage_in_bytes", "100\n"),
            ("memory.failcnt", "12\n"),
            ("memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n"),
        ],
    );
    write(&cpu.join("elsewhere"), &[("cpu.stat", "nr_periods 1\nnr_throttled 1\nthrottled_time 5000\n")]);
    let mounts = Mounts { memory: Some(memory), cpu: Some(cpu), ..Mounts::default() };
    let paths = ProcessPaths::of("4:memory:/box\n2:cpu,cpuacct:/elsewhere\n0::/\n", "/box", true);
    let readings = mounts.read_at(&paths);
    assert_eq!(readings.len(), 1, "{readings:?}");
    let reading = &readings[0];
    assert_eq!((&*reading.path, reading.memory_limit_bytes, reading.limit_hits), ("/box", 100, 12));
    assert_eq!((reading.oom_kills, reading.throttled, reading.throttled_us), (1, 1, 5));
}

#[test]
fn cgroups_hidden_by_a_namespace_are_read_by_path() {
    let of_process = "0::/../../pod1.slice/cri-containerd-a.scope\n";
    let paths = ProcessPaths::of(of_process, "", false);
    assert_eq!(paths, ProcessPaths::default());
    let known = "/kubepods.slice/pod1.slice/cri-containerd-a.scope";
    assert_eq!(ProcessPaths::of(of_process, known, true).version_2, known);
}

#[test]
fn a_path_out_of_the_cgroup_namespace_is_not_followed() {
    let text = "4:memory:/../../kubepods/pod1\n0::/../../kubepods/pod1\n";
    let named = ProcessPaths::of(text, "/kubepods/pod1", false);
    assert_eq!((&*named.memory, &*named.version_2), ("/kubepods/pod1", "/kubepods/pod1"));
    assert_eq!(ProcessPaths::of(text, "", false), ProcessPaths::default(), "nor where nothing else is known");
}

#[test]
fn hierarchies_are_found_by_their_controllers() {
    let mounts = Mounts::parse(
        "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n\
         35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory\n\
         36 31 0:33 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu,cpuacct\n\
         41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n",
    );
    let expected = Mounts {
        version_2: Some("/sys/fs/cgroup/unified".into()),
        memory: Some("/sys/fs/cgroup/memory".into()),
        pids: None,
        cpu: Some("/sys/fs/cgroup/cpu".into()),
        cpuacct: Some("/sys/fs/cgroup/cpu".into()),
    };
    assert_eq!(mounts, expected);
}
