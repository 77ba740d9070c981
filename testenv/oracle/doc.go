// Package oracle records the kernel's own trace of packets through the legacy
// tables, without a rule in the tables under test.
//
// An nf_tables chain of its own, before all of iptables (priority −350; raw is
// −300), sets skb->nf_trace; from then on ipt_do_table and ip6t_do_table print
// a TRACE line for every rule that matched (net/ipv4/netfilter/ip_tables.c:
// trace_packet), through nf_log_syslog into the kernel's log. What the legacy
// rules see of the packet is the same with and without: nothing can match on
// nf_trace.
//
// It changes the machine it runs on (a table, modules, a sysctl), so it is for
// VMs only. A program that traces nf_tables sees the oracle's table.
//
// Compare holds a tool's lines against the kernel's.
//
// For nf_tables there is [StartNFT]: its table sets nf_trace as well, and what the kernel
// tells by netlink of each base chain that a packet runs through becomes an [NFTRun].
// Chains before the oracle's, and packets in them, it does not see. Nor can it tell which
// packet a chain was run for whose first line is of one that was stolen from it: rules for
// tests have a counter before such a verdict. CompareNFT holds nftrace's JSON against the runs.
package oracle
