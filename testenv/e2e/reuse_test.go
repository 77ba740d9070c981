package e2e

import (
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/nftrace/nftrace/testenv/topo"
)

// Packets that nobody asked for, whose flows the probes know, go between those that are
// asked for, and the kernel gives each the memory of the one before.
func TestBetweenOtherPackets(t *testing.T) {
	needNftrace(t)
	up(t, "docker")
	const n = 11
	p := attached(t, "h", nil, "--format", "json", "udp dst port 9")
	q := attached(t, "h", nil, "--format", "json", "--netns", "c2", "udp dst port 10")
	sh(t, fmt.Sprintf(`
for i in $(seq %d); do
	ip netns exec c2 traffic udp-send -n 1 10.211.55.1:10
	ip netns exec c2 traffic udp-send -n 1 10.211.55.1:9
	ip netns exec h traffic udp-send -n 1 127.0.0.1:9
	ip netns exec h traffic udp-send -n 1 127.0.0.1:10
done
`, n))
	for p, want := range map[*process]int{p: 2 * n, q: n} {
		p.signal(syscall.SIGINT)
		p.want(0)
		list := objects(t, p.stdout.String(), false)
		if len(list) != want || p.summary() != want {
			t.Errorf("%s: %d packets, want %d: %s", p.cmd, len(list), want, p.stderr.String())
		}
		for _, o := range list {
			if o["half_seen"] != "" {
				t.Errorf("%s: a packet is half seen: %v", p.cmd, o["half_seen"])
			}
		}
	}
}

// Where a host has nothing but the filter table, a packet from outside is first seen at
// INPUT, and where it lies in memory, another one may have been sent, and let pass, just before.
func TestReceivedBehindSent(t *testing.T) {
	needNftrace(t)
	up(t, "bare")
	sh(t, "ip netns exec ext iptables-legacy -t filter -L -n >/dev/null")
	// No hook of the sender's: that is outside.
	frames := socketIn(t, "h", unix.AF_PACKET, unix.SOCK_RAW)
	eth0, err := unix.NewIfreq("eth0")
	if err == nil {
		err = unix.IoctlIfreq(frames, unix.SIOCGIFINDEX, eth0)
	}
	if err != nil {
		t.Fatal(err)
	}
	out := &unix.SockaddrLinklayer{Ifindex: int(eth0.Uint32())}
	reader := socketIn(t, "h", unix.AF_INET, unix.SOCK_DGRAM)
	h := &unix.SockaddrInet4{Addr: [4]byte{10, 211, 55, 8}, Port: 10}
	if err := unix.Bind(reader, h); err != nil {
		t.Fatal(err)
	}
	// A datagram that does not come is a failure, not a hang.
	wait := unix.NsecToTimeval(int64(patience))
	if err := unix.SetsockoptTimeval(reader, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait); err != nil {
		t.Fatal(err)
	}
	sender := socketIn(t, "ext", unix.AF_INET, unix.SOCK_DGRAM)
	const n = 31
	p := attached(t, "h", nil, "--format", "json", "--netns", "ext", "udp dst port 9")
	for i := range n {
		if err := unix.Sendto(sender, []byte("sent"), 0, h); err != nil {
			t.Fatal(err)
		}
		// The socket frees it: here is memory for the next packet.
		if _, err := unix.Read(reader, make([]byte, 16)); err != nil {
			t.Fatal(err)
		}
		if err := unix.Sendto(frames, udpFrame(uint16(i+1), 9), 0, out); err != nil {
			t.Fatal(err)
		}
	}
	p.signal(syscall.SIGINT)
	p.want(0)
	if got := len(objects(t, p.stdout.String(), false)); got != n || p.summary() != n {
		t.Errorf("%d packets, want %d: %s", got, n, p.stderr.String())
	}
}

// GRO puts received packets together, and frees those of which the data is another one's now by
// itself: the next packet at the same address in memory is another one.
func TestMergedByGRO(t *testing.T) {
	needNftrace(t)
	up(t, "bare")
	shell(t.Context(), t, t.TempDir(), "setup", nil, truthSetup+"ip netns exec c1 ethtool -K eth0 gro on\n")
	// A program for XDP has h receive packets whose memory GRO, in c1, can take.
	pass, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.XDP, License: "GPL", Instructions: asm.Instructions{
		asm.Mov.Imm(asm.R0, 2), asm.Return(), // XDP_PASS
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer pass.Close()
	for _, ns := range []string{"h", "c1"} {
		if err := topo.Within(ns, func() error {
			eth0, err := net.InterfaceByName("eth0")
			if err != nil {
				return err
			}
			l, err := link.AttachXDP(link.XDPOptions{Program: pass, Interface: eth0.Index, Flags: link.XDPDriverMode})
			if err == nil {
				t.Cleanup(func() { l.Close() })
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
	p := attached(t, "h", nil, "--format", "json", "--netns", "h", "tcp dst port 80")
	script := filepath.Join(t.TempDir(), "traffic")
	if err := os.WriteFile(script, []byte("serve c1 tcp-serve :80\next tcp-get -n 31 -size 3000 172.17.0.2:80\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	sh(t, "traffic script "+script)
	p.signal(syscall.SIGINT)
	p.want(0)
	list := objects(t, p.stdout.String(), false)
	left := 0
	for _, o := range list {
		n := 0
		for _, s := range o["steps"].([]any) {
			step := s.(map[string]any)
			if out, ok := step["out"].(map[string]any); ok && step["kind"] == "xmit" && out["name"] == "vethc1" {
				n++
			}
		}
		if n > 1 {
			t.Errorf("a packet went out of vethc1 %d times: %v", n, o["packet"].(map[string]any)["summary"])
		}
		left += n
	}
	if left < 31*3 {
		t.Errorf("%d packets went out of vethc1, want those of 31 times 3,000 bytes", left)
	}
}

// socketIn makes a socket in a namespace.
func socketIn(t *testing.T, ns string, domain, typ int) (fd int) {
	t.Helper()
	err := topo.Within(ns, func() (err error) {
		fd, err = unix.Socket(domain, typ|unix.SOCK_CLOEXEC, 0)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// udpFrame is a datagram from h to a port of ext's in topology "bare", with the Ethernet header.
func udpFrame(id, port uint16) []byte {
	f := []byte{2, 0, 10, 211, 55, 1, 2, 0, 10, 211, 55, 8, 8, 0} // Ethernet: to, from, IPv4
	ip := []byte{0x45, 0, 0, 32, byte(id >> 8), byte(id), 0, 0, 64, unix.IPPROTO_UDP, 0, 0, 10, 211, 55, 8, 10, 211, 55, 1}
	var sum uint32
	for i := 0; i < len(ip); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(ip[i:]))
	}
	binary.BigEndian.PutUint16(ip[10:], ^uint16(sum+sum>>16))
	// UDP: from port 7, 12 bytes, no checksum.
	return append(append(f, ip...), 0, 7, byte(port>>8), byte(port), 0, 12, 0, 0, 'd', 'a', 't', 'a')
}
