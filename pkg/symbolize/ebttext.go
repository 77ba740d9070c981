package symbolize

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"strings"
)

// ebtText is a rule's text in the making.
type ebtText struct{ words []string }

func (t *ebtText) add(word string) { t.words = append(t.words, word) }

func (t *ebtText) String() string { return strings.Join(t.words, " ") }

// header renders what every rule can ask, and tells whether this one asks anything.
func (t *ebtText) header(b []byte) (conditions bool) {
	flags, inv := binary.NativeEndian.Uint32(b), binary.NativeEndian.Uint32(b[4:])
	option := func(name, value string, not uint32) {
		if inv&not != 0 {
			value = "! " + value
		}
		t.add(name + " " + value)
	}
	if flags&ebtFlag8023 != 0 {
		option("-p", "Length", ebtInvProto)
	} else if flags&ebtFlagNoProt == 0 {
		proto := fmt.Sprintf("0x%x", binary.BigEndian.Uint16(b[8:]))
		if name := ebtProtos[binary.BigEndian.Uint16(b[8:])]; name != "" {
			proto = name
		}
		option("-p", proto, ebtInvProto)
	}
	mac := func(name string, addr, mask []byte, not uint32) {
		value := net.HardwareAddr(addr).String()
		if !bytes.Equal(mask, []byte{255, 255, 255, 255, 255, 255}) {
			value += "/" + net.HardwareAddr(mask).String()
		}
		option(name, value, not)
	}
	if flags&ebtFlagSrc != 0 {
		mac("-s", b[74:80], b[80:86], ebtInvSrc)
	}
	if flags&ebtFlagDst != 0 {
		mac("-d", b[86:92], b[92:98], ebtInvDst)
	}
	for _, d := range []struct {
		name string
		at   int
		not  uint32
	}{{"-i", 10, ebtInvIn}, {"--logical-in", 26, ebtInvLogIn}, {"-o", 42, ebtInvOut}, {"--logical-out", 58, ebtInvLogOu}} {
		// The kernel's wildcard is 1.
		if dev := strings.ReplaceAll(cString(b[d.at:d.at+ifNameSize]), "\x01", "+"); dev != "" {
			option(d.name, dev, d.not)
		}
	}
	return len(t.words) > 0 || inv != 0
}

// ebtProtos are protocols as /etc/ethertypes names them.
var ebtProtos = map[uint16]string{0x0800: "IPv4", 0x86dd: "IPv6", 0x0806: "ARP", 0x8035: "RARP", 0x8100: "802_1Q"}

// extension renders a match or watcher.
func (t *ebtText) extension(name string, data []byte) {
	switch {
	case name == "ip" && len(data) >= 20:
		// struct ebt_ip_info: addresses and masks, then tos, protocol, bitmask, invflags.
		if data[18] & ^byte(7) != 0 {
			break
		}
		say := func(option, value string, not byte) {
			if data[19]&not != 0 {
				value = "! " + value
			}
			t.add(option + " " + value)
		}
		addr := func(option string, at int, not byte) {
			a, _ := netip.AddrFromSlice(data[at : at+4])
			value := a.String()
			if mask := data[at+8 : at+12]; !bytes.Equal(mask, []byte{255, 255, 255, 255}) {
				m, _ := netip.AddrFromSlice(mask)
				value += "/" + m.String()
			}
			say(option, value, not)
		}
		if data[18]&1 != 0 {
			addr("--ip-src", 0, 1)
		}
		if data[18]&2 != 0 {
			addr("--ip-dst", 4, 2)
		}
		if data[18]&4 != 0 {
			say("--ip-tos", fmt.Sprintf("0x%02X", data[16]), 4)
		}
		return
	case name == "mark_m" && len(data) >= 18 && data[17] == 1:
		// struct ebt_mark_m_info: mark, mask, invert, bitmask
		mark, mask := binary.NativeEndian.Uint64(data), binary.NativeEndian.Uint64(data[8:])
		value := fmt.Sprintf("0x%x", mark)
		if mask != 0xffffffff && mask != ^uint64(0) {
			value += fmt.Sprintf("/0x%x", mask)
		}
		if data[16] != 0 {
			value = "! " + value
		}
		t.add("--mark " + value)
		return
	}
	t.add("--" + name + " " + more)
}

// ebtNoARP is set beside the verdict of a target snat that leaves ARP's own address alone
// (NAT_ARP_BIT, which is set without --snat-arp).
const ebtNoARP = 0x10

// target renders a target other than a verdict or a jump.
func (t *ebtText) target(name string, data []byte) {
	verdict := ""
	if v := ebtVerdicts(name, data); len(v) > 0 {
		verdict = v[0].String()
	}
	switch {
	case name == "dnat" && len(data) >= 12:
		t.add(fmt.Sprintf("-j dnat --to-dst %s --dnat-target %s", net.HardwareAddr(data[:6]), verdict))
	case name == "snat" && len(data) >= 12:
		arp := " --snat-arp"
		if binary.NativeEndian.Uint32(data[8:])&ebtNoARP != 0 {
			arp = ""
		}
		t.add(fmt.Sprintf("-j snat --to-src %s%s --snat-target %s", net.HardwareAddr(data[:6]), arp, verdict))
	case name == "arpreply" && len(data) >= 12:
		t.add(fmt.Sprintf("-j arpreply --arpreply-mac %s --arpreply-target %s", net.HardwareAddr(data[:6]), verdict))
	case name == "redirect" && verdict != "":
		t.add("-j redirect --redirect-target " + verdict)
	case name == "mark" && verdict != "":
		how := map[uint32]string{ebtMarkSet: "set", ebtMarkOr: "or", ebtMarkAnd: "and", ebtMarkXor: "xor"}[binary.NativeEndian.Uint32(data[8:])&0xf0]
		if how == "" {
			how = "set"
		}
		t.add(fmt.Sprintf("-j mark --mark-%s 0x%x --mark-target %s", how, binary.NativeEndian.Uint64(data), verdict))
	default:
		t.add("-j " + name + " " + more)
	}
}

// Texts returns what ebtables-legacy prints of the rules of a table that was read in ns just
// before, by EBTRule.Index. It asks for a table that is there only, which loads nothing and makes
// none. same tells whether the table is still the one that was read.
func (t *EBTTable) Texts(ns *Namespace, same func() bool) ([]string, error) {
	var out []byte
	err := ns.Do(func() error {
		prog, err := lookPath("ebtables-legacy")
		if err != nil {
			return errors.New("ebtables rule texts need ebtables-legacy in PATH")
		}
		ctx, cancel := context.WithTimeout(context.Background(), saveTimeout)
		defer cancel()
		out, err = runProgram(ctx, prog, "-M", "/nonexistent", "-t", t.Name, "-L")
		return err
	})
	if err != nil {
		return nil, err
	}
	if !same() {
		return nil, errors.New("the rules changed while ebtables-legacy read them")
	}
	return t.mapTexts(out)
}

var ebtChainLine = regexp.MustCompile(`^Bridge chain: (.*), entries: ([0-9]+), policy: ([A-Z]+)$`)

// mapTexts lays the output of ebtables -L over the table's rules. It fails rather than give any
// rule a text that may be another's.
func (t *EBTTable) mapTexts(list []byte) ([]string, error) {
	var texts []string
	chain := -1
	for line := range strings.Lines(string(list)) {
		line = strings.TrimSuffix(strings.TrimSuffix(line, "\n"), " ")
		if m := ebtChainLine.FindStringSubmatch(line); m != nil {
			if chain++; chain >= len(t.Chains) || t.Chains[chain].Name != m[1] || fmt.Sprint(len(t.Chains[chain].Rules)) != m[2] {
				return nil, fmt.Errorf("%w: chain %q", errTexts, m[1])
			}
			continue
		}
		if line == "" || chain < 0 {
			continue
		}
		if len(texts) >= len(t.Rules) || t.Rules[len(texts)].Chain != t.Chains[chain] || !t.Rules[len(texts)].fits(line) {
			return nil, fmt.Errorf("%w: %q", errTexts, line)
		}
		texts = append(texts, oneLine(line))
	}
	if len(texts) != len(t.Rules) || chain != len(t.Chains)-1 {
		return nil, fmt.Errorf("%w: %d rules of %d", errTexts, len(texts), len(t.Rules))
	}
	return texts, nil
}

// fits compares a rule's target with the -j of its text.
func (r *EBTRule) fits(line string) bool {
	want := r.Target
	switch {
	case r.Dest != nil:
		want = r.Dest.Name
	case r.Target == ebtStandard && len(r.Verdicts) > 0:
		want = r.Verdicts[0].String()
	}
	words := strings.Fields(line)
	for i := 0; i+1 < len(words); i++ {
		if words[i] == "-j" && words[i+1] == want {
			return true
		}
	}
	return false
}
