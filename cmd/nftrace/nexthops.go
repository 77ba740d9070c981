package main

import (
	"bytes"
	"os"

	"github.com/nftrace/nftrace/pkg/symbolize"
)

// sayNextHops warns, once, of the only thing that may become of packets otherwise than without nftrace: where
// fib_multipath_hash_policy is 1 the kernel chooses among next hops by a packet's flow hash if it has that
// already (fib_multipath_hash, rt6_multipath_hash), and computes it otherwise.
func (s *session) sayNextHops() {
	if s.nextHops || !s.tracer.HashesFlows() {
		return
	}
	s.nextHops = true
	var by []*symbolize.Namespace
	for _, ns := range s.tables.sys.Namespaces() {
		// One that is just gone forwards nothing.
		_ = ns.Do(func() error {
			if byPorts("/proc/sys/net/ipv4/fib_multipath_hash_policy") || byPorts("/proc/sys/net/ipv6/fib_multipath_hash_policy") {
				by = append(by, ns)
			}
			return nil
		})
	}
	if len(by) > 0 {
		s.say.say("in %s fib_multipath_hash_policy is 1: of routes with several next hops, flows that are forwarded may take another one while nftrace runs (README, Limits)", nsNames(by))
	}
}

// byPorts tells whether a sysctl says that next hops are chosen by ports, too.
func byPorts(sysctl string) bool {
	policy, err := os.ReadFile(sysctl)
	return err == nil && bytes.Equal(bytes.TrimSpace(policy), []byte("1"))
}
