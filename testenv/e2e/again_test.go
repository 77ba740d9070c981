package e2e

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
)

// A namespace gets the number of one that is no more, changes its nf_tables as often, with rules of
// the same handles, and has another name: its rules are told, and its name is.
func TestNamespaceNumberAgain(t *testing.T) {
	needNftrace(t)
	sh(t, "modprobe nf_tables")
	p := attached(t, "", nil, "icmp")
	inode := func(ns string) uint64 {
		var st syscall.Stat_t
		if err := syscall.Stat("/run/netns/"+ns, &st); err != nil {
			t.Fatal(err)
		}
		return st.Ino
	}
	var first uint64
	for _, ns := range []string{"early", "late"} {
		add := "ip netns add " + ns
		del := "ip netns del " + ns
		sh(t, add)
		if first == 0 {
			first = inode(ns)
		}
		// The kernel gives a number back some time after its namespace is no more.
		eventually(t, fmt.Sprintf("a namespace with the number %d", first), func() bool {
			if inode(ns) == first {
				return true
			}
			sh(t, del+"; "+add)
			return false
		})
		rule := fmt.Sprintf(`ip daddr 127.0.0.1 counter comment "%s"`, ns)
		sh(t, fmt.Sprintf(`ip -n %s link set lo up
ip netns exec %s nft 'table ip t { chain out { type filter hook output priority 0; %s; }; }'`, ns, ns, rule))
		pingAll(t, ns, 7, "127.0.0.1")
		eventually(t, "the packets of "+ns, func() bool { return strings.Count(p.stdout.String(), "delivered locally in namespace "+ns+"\n") >= 14 })
		if out := p.stdout.String(); strings.Count(out, `comment "`+ns+`"`) != 14 {
			t.Errorf("%d packets met the rule of %s, want 14:\n%s", strings.Count(out, `comment "`+ns+`"`), ns, out)
		}
		sh(t, del)
	}
	p.signal(syscall.SIGINT)
	p.want(0)
	if n := p.summary(); n != 28 {
		t.Errorf("%d packets, want 28: %s", n, p.stderr.String())
	}
}
