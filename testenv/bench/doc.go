// Bench counts what nftrace costs a packet, in instructions of a guest.
//
//	bench [-rounds 3] [-profile]
//	bench -attach
//
// It is meant for a VM of testenv that counts instructions (vm -icount): a
// nanosecond of the guest's clock is then one instruction, so that a clock
// counts them, the same on any host however busy. `make bench` runs it.
//
// A sender writes UDP datagrams of one flow from container c2 of topology
// "docker": through the bridge, Docker's rules and MASQUERADE to ext, where they are
// read one by one. What is counted is all that the one CPU executes, whoever
// runs, nftrace's own process included: the kernel's sum of the time that tasks ran
// (rq_cpu_time in /proc/schedstat). Idle time does not count. Counting begins before
// the first datagram and ends when nftrace has written its last line to a file in
// memory. What does not depend on the number of packets falls out: two
// counts, of a few and of many datagrams, give a slope, and their difference
// divided by the difference of datagrams is the cost of one.
//
// The kernel's own cost varies by some hundred instructions from one minute to the
// next. So each variant stands between two baselines (no tracer), is compared with
// their mean, and the medians of several rounds are reported. A count in which
// nftrace lost a packet, or left one unresolved, is void.
//
// Instructions hide what caches and traps cost. They flatter kprobes, which
// nftrace does not use here, and the TRACE target with its long copies.
//
// The counters of legacy tables are per CPU where more than one CPU is possible,
// and stand in the rules otherwise. Both are measured: a second CPU that is never
// started (vm -smp 2 -append maxcpus=1) makes the difference.
//
// Of the kernel's statistics of BPF programs, -profile tells how the cost is made
// up. They count instructions too, with their own share in it: a probe that
// does nothing tells how much that is, and what a trampoline costs at least.
package main
