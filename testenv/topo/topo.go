package topo

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"sort"
	"strings"

	"golang.org/x/sys/unix"
)

// A Topology is a set of namespaces that Up has built.
type Topology struct {
	Name       string
	Namespaces []string
}

// definition is what Up runs, in order: links and addresses for `ip -batch` of
// each namespace, then shell lines, then rulesets for COMMAND-restore.
type definition struct {
	namespaces []string
	modules    []string
	links      []step
	sysctls    []step
	rules      []ruleset
}

type step struct{ ns, text string }

type ruleset struct{ ns, command, text string }

// topologies is the table of topologies, by the name that test cases use.
var topologies = map[string]definition{
	// One namespace with loopback and nothing else.
	"lo": {namespaces: []string{"h"}},
	// Topology D of the scenarios, with Docker 20.10's rules.
	"docker": docker("iptables-legacy"),
	// The same by way of nf_tables.
	"docker-nft": docker("iptables-nft"),
	// The same with ebtables' tables loaded and empty, and the rules of Docker 17, which had
	// one chain DOCKER-ISOLATION with one rule.
	"docker-ebtables": dockerEbtables(),
	// The same namespaces, links and addresses, with no table loaded.
	"bare": docker(""),
}

// Names returns the topologies that Up knows.
func Names() []string {
	var names []string
	for n := range topologies {
		names = append(names, n)
	}
	sort.Strings(names)
	return names
}

// quiet is set before a namespace has links, so that they inherit it: nothing
// that a test did not send, and replies without limits of rate.
const quiet = `
cd /proc/sys/net
for i in all default; do
	echo 0 > ipv6/conf/$i/accept_dad
	echo 0 > ipv6/conf/$i/accept_ra
	echo 0 > ipv6/conf/$i/router_solicitations
	echo 1 > ipv6/conf/$i/mldv1_unsolicited_report_interval
	echo 1 > ipv6/conf/$i/mldv2_unsolicited_report_interval
done
echo 0 > ipv4/icmp_ratelimit
echo 0 > ipv6/icmp/ratelimit
`

// docker is topology D; program is which iptables its rules are given to, if any. The MAC
// addresses say who is who: 02:00:IPv4 address.
func docker(program string) definition {
	d := definition{
		namespaces: []string{"h", "c1", "c2", "ext"},
		modules:    []string{"veth", "bridge", "br_netfilter"},
		links: []step{
			{"h", `
link add docker0 address 02:00:ac:11:00:01 type bridge stp_state 0 forward_delay 0 mcast_snooping 0
addr add 172.17.0.1/16 brd + dev docker0
addr add fd00:17::1/64 dev docker0 nodad
link set docker0 up
link add vethc1 type veth peer name eth0 address 02:00:ac:11:00:02 netns c1
link add vethc2 type veth peer name eth0 address 02:00:ac:11:00:03 netns c2
link set vethc1 master docker0 up
link set vethc2 master docker0 up
link add eth0 address 02:00:0a:d3:37:08 type veth peer name eth0 address 02:00:0a:d3:37:01 netns ext
addr add 10.211.55.8/24 brd + dev eth0
addr add fd00:55::8/64 dev eth0 nodad
link set eth0 up
neigh add 172.17.0.2 lladdr 02:00:ac:11:00:02 dev docker0 nud permanent
neigh add 172.17.0.3 lladdr 02:00:ac:11:00:03 dev docker0 nud permanent
neigh add fd00:17::2 lladdr 02:00:ac:11:00:02 dev docker0 nud permanent
neigh add fd00:17::3 lladdr 02:00:ac:11:00:03 dev docker0 nud permanent
neigh add 10.211.55.1 lladdr 02:00:0a:d3:37:01 dev eth0 nud permanent
neigh add fd00:55::1 lladdr 02:00:0a:d3:37:01 dev eth0 nud permanent
`},
			{"ext", `
addr add 10.211.55.1/24 brd + dev eth0
addr add fd00:55::1/64 dev eth0 nodad
link set eth0 up
neigh add 10.211.55.8 lladdr 02:00:0a:d3:37:08 dev eth0 nud permanent
neigh add fd00:55::8 lladdr 02:00:0a:d3:37:08 dev eth0 nud permanent
route add fd00:17::/64 via fd00:55::8
`},
			{"c1", container("2", "3")},
			{"c2", container("3", "2")},
		},
		sysctls: []step{{"h", `
cd /proc/sys/net
echo 1 > ipv4/ip_forward
echo 1 > ipv6/conf/all/forwarding
echo 1 > bridge/bridge-nf-call-iptables
echo 1 > bridge/bridge-nf-call-ip6tables
`}},
	}
	if program != "" {
		d.rules = []ruleset{{"h", program, DockerRules}}
	}
	return d
}

func dockerEbtables() definition {
	d := docker("iptables-legacy")
	d.modules = append(d.modules, "ebtable_broute", "ebtable_nat", "ebtable_filter")
	var rules []string
	for line := range strings.Lines(DockerRules) {
		switch {
		case strings.Contains(line, "DOCKER-ISOLATION-STAGE-2"):
			continue
		case strings.HasPrefix(line, "-A DOCKER-ISOLATION-STAGE-1"):
			line = "-A DOCKER-ISOLATION -j RETURN\n"
		}
		rules = append(rules, strings.ReplaceAll(line, "-STAGE-1", ""))
	}
	d.rules = []ruleset{
		{"h", "iptables-legacy", strings.Join(rules, "")},
		// Tables are made when somebody asks for them.
		{"h", "ebtables-legacy", "*broute\n*nat\n*filter\n"},
	}
	return d
}

// container gives the address and the neighbours of one container.
func container(self, other string) string {
	return strings.NewReplacer("SELF", self, "OTHER", other).Replace(`
addr add 172.17.0.SELF/16 brd + dev eth0
addr add fd00:17::SELF/64 dev eth0 nodad
link set eth0 up
neigh add 172.17.0.1 lladdr 02:00:ac:11:00:01 dev eth0 nud permanent
neigh add 172.17.0.OTHER lladdr 02:00:ac:11:00:0OTHER dev eth0 nud permanent
neigh add fd00:17::1 lladdr 02:00:ac:11:00:01 dev eth0 nud permanent
neigh add fd00:17::OTHER lladdr 02:00:ac:11:00:0OTHER dev eth0 nud permanent
route add default via 172.17.0.1
route add default via fd00:17::1
`)
}

// DockerRules is what Docker 20.10 loads with no port published, in the format
// of iptables-restore. Raw and mangle are loaded, too, and empty.
const DockerRules = `*raw
COMMIT
*mangle
COMMIT
*nat
:PREROUTING ACCEPT
:INPUT ACCEPT
:OUTPUT ACCEPT
:POSTROUTING ACCEPT
:DOCKER -
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A DOCKER -i docker0 -j RETURN
COMMIT
*filter
:INPUT ACCEPT
:FORWARD DROP
:OUTPUT ACCEPT
:DOCKER -
:DOCKER-ISOLATION-STAGE-1 -
:DOCKER-ISOLATION-STAGE-2 -
:DOCKER-USER -
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-ISOLATION-STAGE-1
-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -o docker0 -j DOCKER
-A FORWARD -i docker0 ! -o docker0 -j ACCEPT
-A FORWARD -i docker0 -o docker0 -j ACCEPT
-A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2
-A DOCKER-ISOLATION-STAGE-1 -j RETURN
-A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP
-A DOCKER-ISOLATION-STAGE-2 -j RETURN
-A DOCKER-USER -j RETURN
COMMIT
`

// Up builds a topology. If it fails, what was built is taken down.
func Up(ctx context.Context, name string) (t *Topology, err error) {
	d, ok := topologies[name]
	if !ok {
		return nil, fmt.Errorf("no topology %q: there are %s", name, strings.Join(Names(), ", "))
	}
	if !inVM() && !ownRun() {
		return nil, fmt.Errorf("topology %s: not on this machine: run it in a VM (testenv/cmd/vm)", name)
	}
	t = &Topology{Name: name, Namespaces: slices.Clone(d.namespaces)}
	defer func() {
		if err != nil {
			t.Down(context.WithoutCancel(ctx))
			t, err = nil, fmt.Errorf("topology %s: %w", name, err)
		}
	}()
	if len(d.modules) > 0 {
		if err := command(ctx, "", "modprobe", append([]string{"-a"}, d.modules...)...); err != nil {
			return t, err
		}
	}
	// Multicast reports are sent once and not again seconds later. This one
	// knob is the machine's, and not the namespace's.
	if inVM() {
		if err := os.WriteFile("/proc/sys/net/ipv6/mld_qrv", []byte("1"), 0); err != nil {
			return t, err
		}
	}
	for _, ns := range d.namespaces {
		if err := command(ctx, "", "ip", "netns", "add", ns); err != nil {
			return t, err
		}
		if err := Shell(ctx, ns, quiet+"ip link set lo up\n"); err != nil {
			return t, err
		}
	}
	for _, s := range d.links {
		if err := command(ctx, strings.TrimSpace(s.text)+"\n", "ip", "-n", s.ns, "-batch", "-"); err != nil {
			return t, err
		}
	}
	for _, s := range d.sysctls {
		if err := Shell(ctx, s.ns, s.text); err != nil {
			return t, err
		}
	}
	for _, r := range d.rules {
		if err := Load(ctx, r.ns, r.command, r.text); err != nil {
			return t, err
		}
	}
	return t, nil
}

func inVM() bool { return os.Getenv("NFTRACE_IN_VM") == "1" }

// ownRun tells whether /run, and so the names of namespaces in it, is another one
// than that of the machine's init.
func ownRun() bool {
	own, err := os.Stat("/run")
	if err != nil {
		return false
	}
	init, err := os.Stat("/proc/1/root/run")
	return err == nil && !os.SameFile(own, init)
}

// Down deletes the namespaces, and with them all that is in them.
func (t *Topology) Down(ctx context.Context) error {
	var first error
	for _, ns := range t.Namespaces {
		if _, err := os.Stat("/run/netns/" + ns); err != nil {
			continue
		}
		if err := command(ctx, "", "ip", "netns", "del", ns); err != nil && first == nil {
			first = err
		}
	}
	return first
}

// Load adds rules to what a namespace has. command is "nft", or the name of a
// program of the iptables family, whose -restore takes them.
func Load(ctx context.Context, ns, program, rules string) error {
	args := []string{"netns", "exec", ns}
	switch program {
	case "nft":
		args = append(args, "nft", "-f", "-")
	case "ebtables-legacy":
		args = append(args, program+"-restore", "--noflush")
	case "ebtables-nft", "arptables-nft":
		args = append(args, program+"-restore", "--noflush")
	default:
		args = append(args, program+"-restore", "--noflush", "--wait")
	}
	if err := command(ctx, rules, "ip", args...); err != nil {
		return fmt.Errorf("rules of %s: %w", ns, err)
	}
	return nil
}

// Shell runs shell lines in a namespace; the first that fails ends it.
func Shell(ctx context.Context, ns, lines string) error {
	return command(ctx, "", "ip", "netns", "exec", ns, "sh", "-e", "-c", lines)
}

// Within runs f on a thread in a namespace; sockets that it makes stay there. The thread ends.
func Within(ns string, f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		fd, err := unix.Open("/run/netns/"+ns, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			err = unix.Setns(fd, unix.CLONE_NEWNET)
			unix.Close(fd)
		}
		if err != nil {
			done <- fmt.Errorf("namespace %s: %w", ns, err)
			return
		}
		done <- f()
	}()
	return <-done
}

func command(ctx context.Context, stdin, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	var out bytes.Buffer
	cmd.Stdin = strings.NewReader(stdin)
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w: %s", cmd, err, strings.TrimSpace(out.String()))
	}
	return nil
}
