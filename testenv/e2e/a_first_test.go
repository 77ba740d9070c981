package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nftrace/nftrace/testenv/topo"
)

// TestFewerTypes: a kernel that is built without conntrack, br_netfilter or nf_tables is traced, too.
// What it lacks, it lacks in its types. This loads no module: see the next one.
func TestFewerTypes(t *testing.T) {
	needNftrace(t)
	const at = "/sys/kernel/btf/vmlinux"
	types := read(t, at)
	for _, name := range []string{
		"_nfct", "nf_conn", // CONFIG_NF_CONNTRACK
		"SKB_EXT_BRIDGE_NF", "nf_bridge_info", // CONFIG_BRIDGE_NETFILTER
		"active_extensions", // CONFIG_SKB_EXTENSIONS
		"gencursor",         // CONFIG_NF_TABLES
	} {
		name, other := "\x00"+name+"\x00", "\x00"+name[:len(name)-1]+"~\x00"
		if strings.Count(types, name) != 1 {
			t.Fatalf("%q is in the kernel's types %d times, want once", name, strings.Count(types, name))
		}
		types = strings.Replace(types, name, other, 1)
	}
	fewer := filepath.Join(t.TempDir(), "vmlinux")
	if err := os.WriteFile(fewer, []byte(types), 0o644); err != nil {
		t.Fatal(err)
	}
	sh(t, "mount --bind "+fewer+" "+at)
	t.Cleanup(func() { sh(t, "umount "+at) })
	up(t, "lo")
	// ip netns exec would mount a /sys of its own.
	p := spawn(t, "", nil, "nsenter", "--net=/run/netns/h", "nftrace", "icmp", "--", "ping", "-q", "-c", "3", "-i", "0.01", "127.0.0.1")
	if n := p.summary(); n != 6 {
		t.Errorf("%d packets, want 6", n)
	}
}

// TestIPTablesComesLater must be the first test of a boot that uses iptables, ebtables, arptables or
// nft, and is: go runs tests in the order of their files.
func TestIPTablesComesLater(t *testing.T) {
	needNftrace(t)
	for _, m := range []string{"x_tables", "nf_tables", "ebtables"} {
		if strings.Contains(read(t, "/proc/modules"), m+" ") {
			t.Fatalf("%s is loaded: this must come first", m)
		}
	}
	up(t, "lo")
	start := time.Now()
	p := attached(t, "h", nil, "--format", "trace", "icmp")
	attaching := time.Since(start)
	eventually(t, "being told", func() bool { return strings.Contains(p.stderr.String(), "no rulesets on this system yet") })
	if err := topo.Shell(t.Context(), "h", "iptables-legacy -A OUTPUT -p icmp -j ACCEPT"); err != nil {
		t.Fatal(err)
	}
	start = time.Now()
	eventually(t, "tracing what was loaded", func() bool {
		if err := topo.Shell(t.Context(), "h", "ping -q -c 1 -W 1 127.0.0.1"); err != nil {
			t.Fatal(err)
		}
		return strings.Contains(p.stdout.String(), "TRACE: filter:OUTPUT:")
	})
	took := time.Since(start)
	// A second where nftrace starts at once; in an emulated machine it does not. x_tables
	// and ip_tables are attached one after the other.
	t.Logf("attached in %v, traced %v after iptables", attaching.Round(time.Millisecond), took.Round(time.Millisecond))
	if took > 2*attaching+time.Second {
		t.Errorf("it took %v to trace what was loaded, %v to start", took, attaching)
	}
	if err := topo.Shell(t.Context(), "h", countNFT); err != nil {
		t.Fatal(err)
	}
	eventually(t, "tracing nf_tables", func() bool {
		if err := topo.Shell(t.Context(), "h", "ping -q -c 1 -W 1 127.0.0.1"); err != nil {
			t.Fatal(err)
		}
		return strings.Contains(p.stdout.String(), "TRACE: inet:t:out:rule:1 ")
	})
	said := []string{"ip_tables", "traced from now on", "module nf_tables was loaded"}
	if hasEbtables() {
		said = append(said, "module ebtables was loaded")
		if err := topo.Shell(t.Context(), "h", countBridged); err != nil {
			t.Fatal(err)
		}
		eventually(t, "tracing ebtables", func() bool {
			topo.Shell(t.Context(), "h", "ping -q -c 1 -W 0.1 10.9.0.2") // nobody answers
			return strings.Contains(p.stdout.String(), "TRACE: eb:filter:OUTPUT:rule:1 ")
		})
	}
	p.signal(syscall.SIGINT)
	p.want(0, said...)
	p.summary()
}

// Rules that count what is sent: of nf_tables, and of ebtables on a bridge where nobody answers.
const (
	countNFT     = "nft 'add table inet t; add chain inet t out { type filter hook output priority 0; }; add rule inet t out counter'\n"
	countBridged = `ip link add br0 type bridge
ip link add v0 type veth peer name v1
ip link set v0 master br0 up
ip link set v1 up
ip addr add 10.9.0.1/24 dev br0
ip link set br0 up
ip neigh add 10.9.0.2 lladdr 02:00:00:00:00:02 dev br0 nud permanent
ebtables-legacy -A OUTPUT -p IPv4 -j CONTINUE
`
)
