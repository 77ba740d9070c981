package symbolize

import (
	"encoding/binary"
	"fmt"
	"net"
	"slices"
	"testing"
	"time"
)

// packetCounts reads the packet counter of every entry of a table of this
// thread's namespace.
func packetCounts(t *testing.T, family Family, name string) (*Table, []uint64) {
	t.Helper()
	info, blob, err := readBlob(family, name)
	if err != nil {
		t.Fatal(err)
	}
	tab, err := ParseTable(family, name, info, blob)
	if err != nil {
		t.Fatal(err)
	}
	l, _ := layoutOf(family)
	var n []uint64
	for i := range tab.Entries {
		// struct xt_counters is the last of the header.
		n = append(n, binary.NativeEndian.Uint64(blob[tab.EntryOffset(i)+l.size-16:]))
	}
	return tab, n
}

// TestWalkLive lets this kernel count: one packet over lo, whose way through
// INPUT is known from the rules.
func TestWalkLive(t *testing.T) {
	rules := `*filter
:INPUT DROP [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:G - [0:0]
:J - [0:0]
:K - [0:0]
-A INPUT -p udp -m udp --dport 1001 -g G
-A INPUT -j J
-A INPUT -p udp -m udp --dport 1002 -j RETURN
-A INPUT -m mark --mark 0x1 -j J
-A INPUT -p udp -m udp --dport 1003:1005 -j ACCEPT
-A INPUT -p udp -m udp --dport 1006 -j REJECT
-A G -p udp
-A J -p udp -m udp --dport 1004:1005 -j K
-A J -p udp -m udp --dport 1003 -j MARK --set-xmark 0x1/0xffffffff
-A K -p udp -m udp --dport 1004 -g G
-A K -j ACCEPT
COMMIT
`
	s, a, _ := inNamespaces(t, `
		for p in $A; do
			nsenter -n -t $p ip link set lo up
			nsenter -n -t $p iptables-legacy-restore <<'EOT'
`+rules+`EOT
			nsenter -n -t $p ip6tables-legacy-restore <<'EOT'
`+rules+`EOT
		done`)
	ns, err := s.ResolveNetns(fmt.Sprintf("pid:%d", a))
	if err != nil {
		t.Fatal(err)
	}
	want := map[int][]string{
		1001: {"INPUT:rule:1 goto G", "G:rule:1 continue", "G:return:2 RETURN", "INPUT:policy:7 DROP"},
		1002: {"INPUT:rule:2 jump J", "J:return:3 RETURN", "INPUT:rule:3 RETURN", "INPUT:policy:7 DROP"},
		1003: {"INPUT:rule:2 jump J", "J:rule:2 continue", "J:return:3 RETURN", "INPUT:rule:4 jump J", "J:rule:2 continue",
			"J:return:3 RETURN", "INPUT:rule:5 ACCEPT"},
		1004: {"INPUT:rule:2 jump J", "J:rule:1 jump K", "K:rule:1 goto G", "G:rule:1 continue", "G:return:2 RETURN",
			"J:return:3 RETURN", "INPUT:rule:5 ACCEPT"},
		1005: {"INPUT:rule:2 jump J", "J:rule:1 jump K", "K:return:2 ACCEPT"},
		1006: {"INPUT:rule:2 jump J", "J:return:3 RETURN", "INPUT:rule:6 REJECT"},
		1007: {"INPUT:rule:2 jump J", "J:return:3 RETURN", "INPUT:policy:7 DROP"},
	}
	err = ns.Do(func() error {
		for _, family := range []Family{IPv4, IPv6} {
			ip := net.IPv4(127, 0, 0, 1)
			if family == IPv6 {
				ip = net.IPv6loopback
			}
			for port, steps := range want {
				recv, err := net.ListenUDP("udp", &net.UDPAddr{IP: ip, Port: port})
				if err != nil {
					return err
				}
				send, err := net.DialUDP("udp", nil, &net.UDPAddr{IP: ip, Port: port})
				if err != nil {
					return err
				}
				_, before := packetCounts(t, family, "filter")
				if _, err := send.Write([]byte("x")); err != nil {
					return err
				}
				// lo hands packets over within the call; a packet that is not
				// here by now was dropped.
				_ = recv.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
				verdict := nfDrop
				if _, err := recv.Read(make([]byte, 8)); err == nil {
					verdict = nfAccept
				}
				tab, after := packetCounts(t, family, "filter")
				recv.Close()
				send.Close()
				var hits []Hit
				for i := range after {
					e := &tab.Entries[i]
					// REJECT's answer is a packet of its own and is no UDP.
					if n := after[i] - before[i]; n > 0 && e.Chain != "OUTPUT" {
						if port == 1006 && (e.IsPolicy || e.Index == at(t, tab, "INPUT", 2) || e.Index == at(t, tab, "J", 3)) {
							n = 1
							if e.IsPolicy {
								continue
							}
						}
						hits = append(hits, Hit{Index: i, Packets: n})
					}
				}
				p, err := tab.Walk(input, hits, verdict, nil)
				if err != nil {
					t.Errorf("%v port %d: %v", family, port, err)
					continue
				}
				if got := lines(p); !slices.Equal(got, steps) {
					t.Errorf("%v port %d: got\n%q\nwant\n%q", family, port, got, steps)
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
