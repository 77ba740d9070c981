// Package topo builds the topologies of the scenarios in network namespaces,
// with ip and iptables, and takes them down again.
//
// A topology is meant for a VM of testenv: it uses fixed names of namespaces. Up
// refuses to build it elsewhere, unless the caller has a /run of its own.
// Nothing in it speaks before it is spoken to: neighbours are static, IPv6 does
// neither duplicate address detection nor router solicitation, and multicast
// reports are over when Up returns. So every packet is a test's own.
package topo
