// Package symbolize turns what the kernel's records say in numbers into what
// people call it: which rules of a legacy table (iptables, arptables, ebtables)
// a run of that table visited, in which order and under which names, what their
// texts are, which table, chain and rule of nf_tables a handle names, and which
// network namespace, interface and container a number stands for.
//
// The package reads the kernel (getsockopt, rtnetlink, nf_tables' netlink,
// /proc) and the engines' sockets, and runs iptables-save, its like and nft,
// only when asked to; everything that computes takes its input as bytes or
// paths, so that it tests without root. Nothing here changes the system: tables
// that do not exist are never asked for, since asking creates them, nor is
// nf_tables where it is not loaded, since asking loads it.
//
// Strings that come from rules, interfaces, namespaces or engines are handed
// on unescaped: whoever prints them escapes them.
//
// It may import netlink libraries, ebpf/btf and golang.org/x/sys/unix, and
// nothing of ours.
package symbolize
